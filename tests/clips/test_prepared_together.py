"""Several processes make a data set folder together: whole sequences each, one index of all."""

from tests.launch import Launch
from tests.recordings import BAD, GOOD, SMALL, break_picture, write_sequence

PROGRAM = "prepare_dsec.py"


def files_of(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name not in ("prepare_dsec.json", ".lock")}


def test_two_processes_make_what_one_makes(warm, tmp_path):
    root, log = tmp_path / "dsec", tmp_path / "log"
    write_sequence(root, GOOD, frames=36)
    break_picture(write_sequence(root, BAD, frames=46, seed=1))
    flags = ["--dsec_root", root, "--split", "test", "--duration", "1s", *SMALL, "--sequences", GOOD,
             BAD, "--allow_missing"]
    assert warm.wait(warm.start([*flags, "--output_root", tmp_path / "one"], log, PROGRAM)) == 0, \
        log.read_text()
    launch = Launch(warm, 2, log, PROGRAM).start(*flags, "--output_root", tmp_path / "two")
    assert launch.wait() == [0, 0], log.read_text()
    place = "my_egpt_dsec_test/my_egpt_dsec_seq_1s"
    one, two = (files_of(tmp_path / name / place) for name in ("one", "two"))
    assert one == two and len(one) > 3
    assert log.read_text().count("RESULT") == 2
