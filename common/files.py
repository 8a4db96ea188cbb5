"""Files that are complete or not there, and JSON lines whose errors name file and line."""
import glob
import gzip
import hashlib
import json
import os
import time
import zlib
from pathlib import Path

from common import dist
from common.errors import UserError

try:
    import fcntl
except ImportError:
    raise SystemExit("error: this system has no file locks; on Windows run this in WSL") from None

LOCK_SECONDS = 10.          # that a process waits for another to stop writing


def output_path(out, default):
    """--out FILE.pt names the file, anything else names the folder for `default`, which is made.  Raises
    UserError on a FILE.pt where no checkpoint is written, since it may be one already, and on FILE.pth."""
    if out.endswith(".pt") and not default.endswith(".pt"):
        raise UserError(f"--out {out}: this script writes {default}; name a folder for it")
    if Path(out).suffix in (".pth", ".ckpt", ".bin", ".safetensors"):
        raise UserError(f"--out {out}: the name of a checkpoint ends in .pt; anything else is a folder")
    path = Path(out) if out.endswith(".pt") else Path(out) / default
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def lock(path):
    """Holds the new file `path` until it is closed or the process ends.  Raises UserError if another process
    holds it for LOCK_SECONDS, in which a worker whose parent was killed has stopped."""
    held = open(path, "w")
    for _ in range(round(LOCK_SECONDS / 0.2)):
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except (BlockingIOError, PermissionError):
            time.sleep(0.2)
        except OSError:         # a file system without locks
            return held
    raise UserError(f"{path}: another process still writes here; wait for its end, or name another --out")


def atomic_write(path, payload):
    """Writes bytes on rank 0, so that `path` is afterwards the old file or the new one, never half of it."""
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
        raise UserError(f"{path}: cannot be written ({error.strerror}); it is as before") from None


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
    """Raises UserError on a number that is not finite, unless allow_nan: then only Python reads the file."""
    try:
        text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    except ValueError:
        raise UserError(f"{path}: a number to be written is not finite; nothing was written") from None
    atomic_write(path, text.encode())


def write_jsonl(path, rows):
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def loads(text):
    """json.loads, but half a surrogate pair, which UTF-8 cannot spell, becomes a question mark."""
    return json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace"))


def read_jsonl(path, needs):
    """Lines of a .jsonl or .jsonl.gz file as dicts.  needs: {field: type}.  A UserError names the line."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as f:
            return [_parse_line(line, f"{path}, line {number}", needs)
                    for number, line in enumerate(f, 1) if line.strip()]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error})") from None


def _parse_line(line, where, needs):
    try:
        row = loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a .jsonl file has one JSON object a line, and this "
                        f"one begins {line[:40].decode(errors='replace').strip()!r}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed, this is a {type(row).__name__}")
    for field, kind in needs.items():
        if field not in row:
            raise UserError(f"{where}: field {field!r} is missing; fields found: {', '.join(row) or 'none'}")
        if not isinstance(row[field], kind):
            raise UserError(f"{where}: field {field!r} must be of type {kind.__name__}, it is "
                            f"{type(row[field]).__name__}")
    return row
