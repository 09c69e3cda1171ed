"""What tests look for in compiled programs."""

from dllm_jax.hlo import Program


def loop_copies(text: str, shape: str, *, depth: int) -> list[str]:
    """Copies of an array of the given shape ("[4,32]") in loops `depth` deep."""
    program = Program(text)
    bodies = program.bodies(depth)
    assert bodies, f"no loop {depth} deep"
    executed = [each for body in bodies for each, _ in program.executed(body)]
    return [each.line for each in executed if each.opcode in ("copy", "copy-start") and shape in each.type]


def loop_collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every collective in a trip of the outermost loops, and of the loops in them."""
    program = Program(text)
    return [(each.kind, each.bytes) for body in program.bodies(1) for each in program.moved(body)]
