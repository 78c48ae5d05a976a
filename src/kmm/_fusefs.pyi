from typing import Any

def install(
    operations: Any,
    shows: dict[str, Any],
    keep: float,
    fh_offset: int,
    opened: bytes,
    pipe: bytes,
) -> tuple[int, int]: ...
def serve(at: int, spin: bool) -> None: ...
