"""Files that are no accepted image: other formats, other things, signatures with nothing behind them."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile

from tests.corpus.pictures import gradient
from tests.image_files import encoded

SIGNATURES = {
    "jpeg": b"\xff\xd8\xff",
    "png": b"\x89PNG\r\n\x1a\n",
    "gif": b"GIF89a",
    "tiff": b"II*\0",
    "webp": b"RIFF\0\0\0\0WEBPVP8 ",
    "bmp": b"BM",
}


def foreign() -> dict[str, bytes]:
    """Name → file that is to be refused for what it is."""
    files = {"empty": b"", "one_byte": b"x", "zeros": bytes(4096), "random": random.Random(1).randbytes(4096)}
    files |= {f"signature_{name}": signature for name, signature in SIGNATURES.items()}
    return files | _texts() | _encoded() | _stubs() | _vast()


def _texts() -> dict[str, bytes]:
    return {
        "text": b"just text, whatever its name says\n" * 20,
        "html_error_page": b"<!doctype html><html><title>404 Not Found</title></html>",
        "s3_error_document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "svg_with_file_link": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "eps_with_pipe": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {marker}) (w) file\n",
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
        "xbm": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0,0,0,0,0,0,0,0};\n",
        "xpm": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #000000", "a"};\n',
    }


def _encoded() -> dict[str, bytes]:
    """Images that Pillow would read, in formats that are not on the list."""
    kinds = {"avif": "AVIF", "jp2": "JPEG2000", "ico": "ICO", "tga": "TGA", "ppm": "PPM", "pcx": "PCX", "sgi": "SGI"}
    return {f"other_{name}": encoded(gradient(), kind) for name, kind in kinds.items()}


def _stubs() -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("a.jpg"), b"x" * 100)
    return {
        "zip": archive.getvalue(),
        "gzip_of_jpeg": gzip.compress(encoded(gradient(), "JPEG"), mtime=0),
        "program": b"MZ" + bytes(200),
        "elf": b"\x7fELF" + bytes(200),
        "dds": b"DDS " + bytes(200),
        "fli": struct.pack("<LHHHHHH", 128, 0xAF11, 1, 320, 200, 8, 0) + bytes(112),
        "fits": b"SIMPLE  =                    T" + b" " * 2850,
        "heic": b"\0\0\0\x20ftypheic" + bytes(60),
        "jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60),
        "mp4": b"\0\0\0\x18ftypisom" + bytes(60),
        "webm": b"\x1aE\xdf\xa3" + bytes(60),
        "riff_wave": b"RIFF" + struct.pack("<L", 92) + b"WAVEfmt " + bytes(84),
        "pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    }


def _vast() -> dict[str, bytes]:
    """Headers of formats that are not read, with sizes that nothing may be reserved for."""
    psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HLLHH", 3, 30_000, 30_000, 8, 3) + bytes(20)
    return {"ppm_100k": b"P6 100000 100000 255\n" + bytes(100), "psd_30k": psd}
