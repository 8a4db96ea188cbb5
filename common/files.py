"""Files that are complete or not there, and JSON lines whose errors name file and line."""
import fcntl
import glob
import gzip
import hashlib
import json
import os
import time
import zlib
from pathlib import Path

from common import dist
from common.errors import UserError, check

LONGEST_LINE = 2 ** 26      # bytes; a file without line ends must not fill the memory
LOCK_SECONDS = 10.          # that a process waits for another to stop writing


def output_path(out, default):
    """--out FILE.pt names the file, anything else names the folder for `default`.  Makes the folder.  Returns
    a Path.  Raises UserError on a FILE.pt where no checkpoint is written: it may be one already."""
    check(not out.endswith(".pt") or default.endswith(".pt"),
          f"--out {out}: this script writes {default}; name a folder for it")
    path = Path(out) if out.endswith(".pt") else Path(out) / default
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make the folder {path.parent} ({error.strerror})") from None
    check(os.access(path.parent, os.W_OK), f"--out {out}: no permission to write in {path.parent}")
    return path


def lock(path):
    """Makes the file `path` and holds it until it is closed or the process ends, so that two processes never
    write the same results.  Returns the open file.  Raises UserError if another process holds it for
    LOCK_SECONDS, in which a worker whose parent was killed has stopped."""
    held, until = open(path, "w"), time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except (BlockingIOError, PermissionError):
            check(time.monotonic() < until, f"{path}: another process still writes here; wait for its end, "
                  "or name another --out")
            time.sleep(0.2)
        except OSError:         # a file system without locks
            return held


def atomic_write(path, payload):
    """Writes bytes so that `path` is afterwards either the old file or the new one, never half of it.  Only
    rank 0 writes."""
    if dist.rank():
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):   # by a run killed while it wrote
        stale.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); the file that stood there before is "
                        "unchanged") from None


def hash_of(path):
    """A name for the content of a folder and all below it; of a path that is no folder, the path."""
    folder, sha = Path(path), hashlib.sha256()
    if not path or not folder.is_dir():
        return str(path)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with open(file, "rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        sha.update(f"{file.relative_to(folder)} {content}\n".encode())
    return sha.hexdigest()[:16]


def write_json(path, content, indent=1, allow_nan=False):
    """Raises UserError on a number that is not finite, which JSON cannot spell, unless allow_nan: then only
    Python reads the file."""
    try:
        text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    except ValueError:
        raise UserError(f"{path}: a number to be written is not finite; nothing was written") from None
    atomic_write(path, text.encode())


def write_jsonl(path, rows):
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def loads(text):
    """json.loads with one kind of error, ValueError, and with strings that can be written again."""
    try:
        return _encodable(json.loads(text))
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def _encodable(x):
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    if isinstance(x, str):
        return x if x.isascii() else x.encode("utf-8", "replace").decode()
    if isinstance(x, list):
        return [_encodable(v) for v in x]
    return {_encodable(k): _encodable(v) for k, v in x.items()} if isinstance(x, dict) else x


def read_jsonl(path, needs):
    """Lines of a .jsonl or .jsonl.gz file as dicts.  needs: {field: type}.  Raises UserError that names file
    and line."""
    return [row for _, row in read_numbered(path, needs)]


def read_numbered(path, needs):
    """The same with the lines' numbers: [(number, dict)].  Empty lines count, and are left out."""
    path = Path(path)
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    rows = []
    try:
        with opened as f:
            for number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE), b""), 1):
                check(len(line) < LONGEST_LINE, f"{path}, line {number}: longer than {LONGEST_LINE} bytes")
                if line.strip():
                    rows.append((number, _parse_line(line, f"{path}, line {number}", needs)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error})") from None
    return rows


def _what_it_is(line, error):
    """What a line that is not JSON seems to be, and what to do.  line: bytes; error: of the parser."""
    if line.startswith(b"\x1f\x8b"):
        return "a gzip file; its name must end in .jsonl.gz"
    if b"\0" in line:
        return "not UTF-8 text but UTF-16 or a binary file; save it as UTF-8"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.object[error.start]:#x} at {error.start}); save it as UTF-8"
    text = line.decode(errors="replace").strip()
    if text in ("[", "{"):
        return "not JSON in one line; a .jsonl file has one JSON object a line"
    if text[:1] not in ("{", "[", '"') and ("," in text or "\t" in text):
        return "this looks like CSV, not JSON; a .jsonl file has one JSON object a line"
    return f"not JSON ({error}); the line begins {text[:40]!r}"


def _parse_line(line, where, needs):
    try:
        row = loads(line)
    except ValueError as error:     # bad UTF-8 raises one too
        raise UserError(f"{where}: {_what_it_is(line, error)}") from None
    check(isinstance(row, dict), f"{where}: a JSON object is needed, this is a {type(row).__name__}")
    for field, kind in needs.items():
        check(field in row, f"{where}: field {field!r} is missing; fields found: {', '.join(row) or 'none'}")
        check(isinstance(row[field], kind),
              f"{where}: field {field!r} must be of type {kind.__name__}, it is {type(row[field]).__name__}")
    return row
