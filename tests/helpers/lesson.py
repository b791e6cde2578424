"""What the tiny model is taught: two questions on each of four pictures."""

TURNS = [
    [("what is shown ?", "a cat"), ("which kind ?", "red")],
    [("what is shown ?", "a ship"), ("which kind ?", "blue")],
    [("what is shown ?", "a tree"), ("is it a cat ?", "no")],
    [("what is shown ?", "a star"), ("is it a star ?", "yes")],
]
STEPS = 12
