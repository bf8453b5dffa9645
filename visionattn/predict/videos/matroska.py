"""Raw RGB frames with timestamps as a Matroska stream, which ffmpeg reads from a pipe.

A raw pipe has no timestamps, so that a video that starts late or has a variable frame rate would lose them. Timestamps
are whole nanoseconds here, finer than those of any container. Format: RFC 9559.
"""

from __future__ import annotations

__all__ = ["frame_head", "stream_head"]

UNKNOWN_SIZE = b"\x01" + b"\xff" * 7
CLUSTER, TIMESTAMP, GROUP, BLOCK, DURATION = b"\x1f\x43\xb6\x75", b"\xe7", b"\xa0", b"\xa1", b"\x9b"
BLOCK_HEAD = b"\x81\x00\x00\x00"  # track 1, at the cluster's time, no flags


def stream_head(height: int, width: int, duration: int) -> bytes:
    """Bytes before the first frame.

    Args:
        height: Rows of a frame.
        width: Columns of a frame.
        duration: Default duration of a frame, in nanoseconds.
    """
    ebml = _element(b"\x42\x82", b"matroska") + _number(b"\x42\x87", 4) + _number(b"\x42\x85", 2)
    information = _number(b"\x2a\xd7\xb1", 1)  # nanoseconds of a tick
    picture = _number(b"\xb0", width) + _number(b"\xba", height) + _element(b"\x2e\xb5\x24", b"RGB\x18")
    track = _number(b"\xd7", 1) + _number(b"\x73\xc5", 1) + _number(b"\x83", 1)
    track += _element(b"\x86", b"V_UNCOMPRESSED") + _number(b"\x23\xe3\x83", duration) + _element(b"\xe0", picture)
    return (
        _element(b"\x1a\x45\xdf\xa3", ebml)
        + b"\x18\x53\x80\x67"  # the segment, as long as the stream
        + UNKNOWN_SIZE
        + _element(b"\x15\x49\xa9\x66", information)
        + _element(b"\x16\x54\xae\x6b", _element(b"\xae", track))
    )


def frame_head(time: int, duration: int, size: int) -> bytes:
    """Bytes before a frame's `size` bytes; time and duration are in nanoseconds."""
    stamp, length = _number(TIMESTAMP, time), _number(DURATION, duration)
    block = BLOCK + _size(len(BLOCK_HEAD) + size) + BLOCK_HEAD
    group = GROUP + _size(len(length) + len(block) + size) + length
    return CLUSTER + _size(len(stamp) + len(group) + len(block) + size) + stamp + group + block


def _element(name: bytes, content: bytes) -> bytes:
    return name + _size(len(content)) + content


def _number(name: bytes, value: int) -> bytes:
    return _element(name, value.to_bytes(8, "big"))


def _size(length: int) -> bytes:
    return (1 << 56 | length).to_bytes(8, "big")
