"""A scene on film: pictures of a colour camera in a moving car, and events of an event camera beside it.

    frames_of(scene, clip_seed, num_frames)   20 frames a second
    events_of(scene, clip_seed, num_frames)
"""

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from demo.world import Scene

# A pinhole camera 1.5 m above the road; metres to the right (x), up (y) and ahead (z) become
# pixels.
SIZE = 96                         # pixels: pictures are square
SCALE = 2  # drawn at twice the size, then averaged: edges move by half pixels
FOCAL, HORIZON, CAMERA_HEIGHT = 90.0, 40.0, 1.5
SPEED = 3.0                       # m/s relative to what stands still
FPS = 20

SKY = {"day": (140, 190, 235), "night": (70, 75, 125), "snow": (205, 210, 220)}
GROUND = {"day": (100, 145, 75), "night": (100, 145, 75), "snow": (238, 240, 245)}
ASPHALT = {"day": (92, 92, 98), "night": (92, 92, 98), "snow": (178, 182, 190)}
NIGHT_SHARE = (0.42, 0.44, 0.58)   # of the day's red, green and blue that is left at night
PAINT = {"red": (215, 40, 35), "blue": (45, 80, 215), "white": (240, 240, 240),
         "yellow": (240, 205, 40),
         "green": (35, 150, 70)}
LAMP = {"red": (255, 45, 30), "green": (40, 255, 110)}
HALF_ROAD = {"highway": 5.4, "city street": 3.8, "country road": 3.0}     # m
DARK, GLASS, STEEL = (28, 28, 32), (75, 95, 115), (120, 122, 128)


class Canvas:
    """Draws boxes, discs and polygons given in metres; at night all is darker but what glows."""

    def __init__(self, light: str, yaw: float, pitch: float):
        self.night = light == "night"
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), self.shade(SKY[light]))
        self.draw = ImageDraw.Draw(self.image)
        self.yaw, self.pitch = yaw, pitch

    def shade(self, colour):
        return tuple(int(c * share)
                     for c, share in zip(colour, NIGHT_SHARE)) if self.night else colour

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        return ((SIZE / 2 + FOCAL * x / z + self.yaw) * SCALE,
                (HORIZON + FOCAL * (CAMERA_HEIGHT - y) / z + self.pitch) * SCALE)

    def polygon(self, points, colour) -> None:
        self.draw.polygon([self.point(*p) for p in points], fill=self.shade(colour))

    def box(self, x, y, z, width, height, colour) -> None:
        """An upright rectangle that stands on height y, with its middle at x."""
        self.draw.rectangle((self.point(x - width / 2, y + height, z),
                             self.point(x + width / 2, y, z)),
                            fill=self.shade(colour))

    def disc(self, x, y, z, radius, colour, glows: bool = False) -> None:
        self.draw.ellipse((self.point(x - radius, y + radius, z),
                           self.point(x + radius, y - radius, z)),
                          fill=colour if glows else self.shade(colour))

    def stripe(self, x, width, near, far, colour) -> None:
        """A strip of ground along the road."""
        self.polygon([(x - width / 2, 0, near), (x + width / 2, 0, near), (x + width / 2, 0, far),
                      (x - width / 2, 0, far)], colour)


def _draw_road(canvas: Canvas, scene: Scene, travelled: float) -> None:
    canvas.stripe(0, 4000, 1.5, 1000, GROUND[scene.light])
    half = HALF_ROAD[scene.road]
    line = (235, 235, 235) if scene.light != "snow" else (120, 124, 135)
    if scene.road == "city street":
        # pavements
        canvas.stripe(0, 2 * half + 7, 1.5, 1000, (175, 165, 155))
    canvas.stripe(0, 2 * half, 1.5, 1000, ASPHALT[scene.light])
    if scene.road == "country road":
        for x in (-half, half):
            canvas.stripe(x, 0.9, 1.5, 1000, (150, 120, 80))  # earth at the edges
        return
    for x in (-half + 0.4, half - 0.4):
        canvas.stripe(x, 0.25, 1.5, 1000, line)
    for x in (0,) if scene.road == "city street" else (-1.8, 1.8):
        for near in np.arange(24, -4, -4) - travelled % 4:
            if near > 0.2:
                canvas.stripe(x, 0.35, max(near, 1.5), max(near, 1.5) + 2, line)
    if scene.road == "highway":
        # Guard rails
        for x in (-half - 0.6, half + 0.6):
            canvas.polygon([(x, 0.9, 1.5), (x, 0.9, 90), (x, 0.5, 90), (x, 0.5, 1.5)], STEEL)


def _draw_background(canvas: Canvas, scene: Scene, layout: np.ndarray, travelled: float) -> None:
    """layout: (24, 3) in [0, 1): what makes one building, tree or mountain differ from the next."""
    white = scene.light == "snow"
    if scene.background == "mountains":
        for k in range(5):
            x, height = -950 + 420 * k + 150 * layout[k, 0], 220 + 130 * layout[k, 1]
            canvas.polygon([(x - 330, 0, 1000), (x, height, 1000), (x + 330, 0, 1000)],
                           (108, 104, 118))
            snow = height * 0.68
            canvas.polygon([(x - 105, snow, 1000), (x, height, 1000), (x + 105, snow, 1000)],
                           (245, 245, 250))
        return
    first = int(travelled // 6)
    # Far ones first
    for k in range(first + 7, first - 1, -1):
        z = 6 * k + 6 - travelled
        if z < 3:
            continue
        for side in (-1, 1):
            size, tint, shift = layout[(2 * k + (side > 0)) % len(layout)]
            if scene.background == "trees":
                x, base = side * (7.5 + shift), 2.0 + 1.2 * size
                canvas.box(x, 0, z, 0.6, base, (95, 65, 40))
                leaves = (225, 230, 235) if white else (35 + int(30 * tint), 105, 40)
                canvas.disc(x, base + 1.2, z, 1.7 + 0.5 * size, leaves)
                canvas.disc(x, base + 2.9, z, 1.1 + 0.3 * size, leaves)
            else:
                x, height = side * (10.5 + shift), 6 + 6 * size
                canvas.box(x, 0, z, 6, height, (150 + int(60 * tint), 125, 105))
                for y in np.arange(1.5, height - 1, 2.4) if z < 30 else ():
                    for dx in (-1.8, 0, 1.8):
                        canvas.box(x + dx, y, z, 1.0, 1.3, (70, 75, 95))


def _draw_vehicle(canvas: Canvas, scene: Scene, x: float, z: float) -> None:
    """The vehicle from behind."""
    body = PAINT[scene.colour]

    def part(dx, y, width, height, colour):
        canvas.box(x + dx, y, z, width, height, colour)

    if scene.vehicle == "motorcycle":
        part(0, 0, 0.32, 0.8, DARK)
        part(0, 0.5, 0.95, 0.4, body)
        part(0, 0.9, 0.7, 0.75, body)  # the rider's jacket
        canvas.disc(x, 1.85, z, 0.27, DARK)
        return
    width, height, floor = {"car": (1.9, 0.95, 0.25), "van": (2.0, 2.2, 0.3),
                            "bus": (2.6, 3.2, 0.35),
                            "truck": (2.5, 2.7, 0.9)}[scene.vehicle]
    for dx in (-width / 2 + 0.3, width / 2 - 0.3):
        part(dx, 0, 0.45, 0.7 if scene.vehicle != "truck" else 0.95, DARK)
    part(0, floor, width, height - floor, body)
    if scene.vehicle == "car":
        canvas.polygon([(x - 0.85, 0.9, z), (x - 0.6, 1.55, z), (x + 0.6, 1.55, z),
                        (x + 0.85, 0.9, z)], body)
        part(0, 0.95, 1.15, 0.48, GLASS)
    if scene.vehicle == "van":
        for dx in (-0.45, 0.45):
            part(dx, 1.35, 0.7, 0.6, GLASS)
    if scene.vehicle == "bus":
        part(0, 1.5, 2.3, 1.2, GLASS)
    if scene.vehicle == "truck":
        part(0, 0.75, 2.5, 0.25, DARK)
        part(0, 0.95, 0.14, 1.7, DARK)  # doors of the cargo box
    for dx in (-width / 2 + 0.2, width / 2 - 0.2):
        canvas.box(x + dx, floor + 0.3, z, 0.25, 0.22, (205, 30, 30))


def _draw_person(canvas: Canvas, x: float, z: float, phase: float) -> None:
    stride = 0.28 * np.sin(phase)
    for foot in (-stride, stride):
        canvas.polygon([(x - 0.1, 0.85, z), (x + 0.1, 0.85, z), (x + foot + 0.1, 0, z),
                        (x + foot - 0.1, 0, z)], (45, 50, 90))
    canvas.box(x, 0.8, z, 0.55, 0.75, (225, 125, 60))
    canvas.disc(x, 1.75, z, 0.2, (225, 180, 150))


def _draw_traffic_light(canvas: Canvas, colour: str, z: float) -> None:
    canvas.box(4.6, 0, z, 0.25, 5.3, STEEL)
    canvas.box(2.3, 5.1, z, 4.8, 0.2, STEEL)
    canvas.box(0, 3.0, z, 1.25, 2.3, (25, 25, 25))
    for lamp, y in (("red", 4.65), ("green", 3.6)):
        canvas.disc(0, y, z, 0.5, LAMP[lamp] if lamp == colour else (62, 62, 62),
                    glows=lamp == colour)


def frames_of(scene: Scene, clip_seed: list[int], num_frames: int,
              numbers: Iterable[int] = ()) -> np.ndarray:
    """Film the scene. -> (F, 96, 96, 3) uint8 RGB, oldest first; `numbers`: of the frames, else all.

    `clip_seed` fixes what the nine words leave open: distances, houses, the camera's shaking. The
    shaking (one pixel) lets an event camera see things that keep their place in the picture.
    """
    random = np.random.default_rng(clip_seed)
    layout = random.random((24, 3))
    low, high = np.array([(0, -0.4, -0.1, -0.6, 0, 12), (6, 0.4, 0.1, -0.2, 2 * np.pi, 13)])
    start, distance, aside, x_person, phase, z_light = np.asarray(random.uniform(low, high)).tolist()
    direction = random.choice((-1, 1))
    shaking = random.uniform(-1, 1, (num_frames, 2))
    flakes = random.random((60, 3)) if scene.light == "snow" else ()
    side = -1 if scene.side == "left" else 1
    pictures = []
    for frame in numbers or range(num_frames):
        time_s = frame / FPS
        travelled = SPEED * time_s
        canvas = Canvas(scene.light, *shaking[frame])
        _draw_road(canvas, scene, start + travelled)
        _draw_background(canvas, scene, layout, start + travelled)
        if scene.traffic_light != "none":
            _draw_traffic_light(canvas, scene.traffic_light, z_light - travelled)
        # One that drives keeps lane and distance; one that is parked stands farther out and comes
        # nearer.
        if scene.motion == "driving":
            _draw_vehicle(canvas, scene, side * (1.7 + aside), 7 + distance)
        else:
            _draw_vehicle(canvas, scene, side * (3.6 + aside), 10.5 + distance - travelled)
        if scene.person == "crossing":
            _draw_person(canvas, direction * (x_person + 0.8 * time_s), 5, phase + 7 * time_s)
        for x, y, size in flakes:
            left, top = x * SIZE * SCALE, (y + 0.6 * time_s) % 1 * SIZE * SCALE
            canvas.draw.ellipse((left, top, left + 2 + 2 * size, top + 2 + 2 * size),
                                fill=(255, 255, 255))
        pictures.append(np.asarray(canvas.image.reduce(SCALE)))
    return np.stack(pictures)


# ------------------------------------------------------------------------------------------- events
THRESHOLD = 0.22                  # change of log brightness that makes one event


def neutral(scene: Scene) -> Scene:
    """The scene that stands for all which look alike to an event camera.

    A darker light scales every pixel by one factor, which the logarithm turns into a constant and
    the difference removes. That the colours of vehicles and lamps count as equally bright, and that
    snow leaves no event, are simplifications of this world.
    """
    lamp = "none" if scene.traffic_light == "none" else "red"
    return dataclasses.replace(scene, light="day", colour="white", traffic_light=lamp)


def events_of(scene: Scene, clip_seed: list[int], num_frames: int) -> dict[str, np.ndarray]:
    """Events of the clip by time: 1-D arrays "x", "y", "t" (us) and "p" (1 brighter, 0 darker).

    The usual model (Rebecq et al., ESIM: an Open Event Camera Simulator, 2018): a pixel fires each
    time its log brightness has moved by THRESHOLD since its last event; between two frames the
    change is linear.
    """
    frames = frames_of(neutral(scene), clip_seed, num_frames)
    brightness = frames @ np.array([0.299, 0.587, 0.114])
    # + 10: or dark pixels fire all the time
    levels = np.log(brightness + 10).reshape(num_frames, -1)
    reference, columns = levels[0].copy(), []
    for k, (before, after) in enumerate(itertools.pairwise(levels)):
        count = (np.abs(after - reference) / THRESHOLD).astype(int) * (after != before)
        pixel = np.repeat(np.arange(len(count)), count)
        # 1, 2, ... by pixel
        nth = np.arange(len(pixel)) - np.repeat(np.cumsum(count) - count, count) + 1
        sign = np.sign(after - reference)
        crossed = reference[pixel] + sign[pixel] * THRESHOLD * nth
        share = ((crossed - before[pixel]) / (after - before)[pixel]).clip(0, 1)
        columns.append((pixel, (k + share) / FPS * 1e6, sign[pixel] > 0))
        reference += sign * THRESHOLD * count
    pixel, t_us, up = (np.concatenate(column) for column in zip(*columns))
    order = np.argsort(t_us, kind="stable")
    y, x = np.divmod(pixel[order], frames.shape[2])
    return {"x": x, "y": y, "t": t_us[order].astype(np.int64), "p": up[order].astype(np.uint8)}
