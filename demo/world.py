"""The demo's scenes: driving scenes in nine words each, and how they follow one another within a sequence.

    demo/filming.py   a scene as a colour camera and as an event camera see it
    demo/texts.py     a scene in two descriptions of different words, which can be read back
    demo/data_sets.py the scenes of each clip, and the data set folders

Events tell neither the vehicle's colour nor the light, nor a red from a green traffic light, and
the draft does not name the road: of the 14.0 bits that nine independent words carry (log2 of 16,200
scenes) the draft's text has 7.8.
"""

import dataclasses

import numpy as np

CHOICES = {
    "road": ("highway", "city street", "country road"),
    "light": ("day", "night", "snow"),
    "background": ("buildings", "trees", "mountains"),
    "vehicle": ("car", "truck", "bus", "van", "motorcycle"),
    "colour": ("red", "blue", "white", "yellow", "green"),
    "side": ("left", "right"),
    "motion": ("parked", "driving"),
    "person": ("nobody", "crossing"),
    "traffic_light": ("none", "red", "green"),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip in nine words; the values are those of CHOICES."""

    road: str
    light: str
    background: str
    vehicle: str
    colour: str
    side: str
    motion: str
    person: str
    traffic_light: str


# What changes together from one clip to the next, and how often: another vehicle, it stops or
# starts, ...
CHANGES = ((("vehicle", "colour", "side", "motion"), 0.6), (("motion",), 0.2), (("person",), 0.5),
           (("traffic_light",), 0.5))


def random_scene(random: np.random.Generator) -> Scene:
    return Scene(**{name: str(random.choice(values)) for name, values in CHOICES.items()})


def following_scenes(scene: Scene, random: np.random.Generator, count: int) -> list[Scene]:
    """`count` scenes of one sequence: road, light and background stay, the rest changes (CHANGES)."""
    scenes = []
    for _ in range(count):
        for names, probability in CHANGES:
            if random.random() < probability:
                words = {name: str(random.choice(CHOICES[name])) for name in names}
                scene = dataclasses.replace(scene, **words)
        scenes.append(scene)
    return scenes
