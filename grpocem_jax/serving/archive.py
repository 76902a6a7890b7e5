"""An adapter's folder as one file: a zip of the files that `checkpoints.save_adapter` writes."""

import io
import lzma
import zipfile
import zlib
from pathlib import Path

from grpocem_jax.runs.checkpoints import ADAPTER_FILES
from grpocem_jax.serving.errors import ApiError

NEEDED = ADAPTER_FILES[:2]
MOST_MEMBERS = 16


def pack(folder: Path) -> bytes:
    """The zip of an adapter's folder; equal folders make equal bytes.

    Raises:
      OSError: a file cannot be read.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in ADAPTER_FILES:
            archive.writestr(zipfile.ZipInfo(f"adapter/{name}"), (folder / name).read_bytes())
    return content.getvalue()


def unpack(content: bytes, folder: Path, *, most: int) -> None:
    """Writes the arrays and the settings of a zipped adapter into a folder.

    The files may lie at the top of the zip or in one folder; others are left out.

    Args:
      content: the zip.
      folder: there already.
      most: bytes that a file may have.

    Raises:
      ApiError: no zip, or one without an adapter or with more than that.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                raise _refuse(f"has {len(members)} files")
            for name in NEEDED:
                found = [x for x in members if x.filename.rpartition("/")[2] == name]
                if len(found) != 1:
                    raise _refuse(f"has {len(found)} files {name}")
                if found[0].file_size > most:
                    raise _refuse(f"has {found[0].file_size} bytes of {name}, at most {most} fit")
                with archive.open(found[0]) as file:
                    read = file.read(most + 1)
                if len(read) > most:
                    raise _refuse(f"has more than {most} bytes of {name}")
                (folder / name).write_bytes(read)
    except (
        EOFError,
        NotImplementedError,
        OSError,
        RuntimeError,
        ValueError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise _refuse(f"cannot be read as one ({error})") from None


def _refuse(why: str) -> ApiError:
    return ApiError(
        400,
        f"the body is no zip of an adapter: it {why}; send {' and '.join(NEEDED)} of one adapter "
        "in a zip.",
        code="invalid_adapter",
    )
