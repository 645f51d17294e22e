"""How the text of a PostgreSQL client is encoded: the server's names for encodings as Python's.

The server reports `client_encoding` in ParameterStatus; what is sent before the report, and an
encoding that is not listed here, is read as UTF-8. Reading a text in the wrong encoding is not
harmless: in some of them (SJIS, BIG5, GBK, UHC, GB18030) the second byte of a character may be a
backslash.
"""

from __future__ import annotations

from appliance.wire.pgtypes import text_of

UTF8 = "utf-8"

#: src/common/encnames.c; names are compared as the server does, by letters and digits only.
_CODECS = {
    "utf8": UTF8, "unicode": UTF8, "sqlascii": UTF8,
    "latin1": "latin-1", "latin2": "iso8859-2", "latin3": "iso8859-3", "latin4": "iso8859-4",
    "latin5": "iso8859-9", "latin6": "iso8859-10", "latin7": "iso8859-13", "latin8": "iso8859-14",
    "latin9": "iso8859-15", "latin10": "iso8859-16",
    "iso88595": "iso8859-5", "iso88596": "iso8859-6", "iso88597": "iso8859-7",
    "iso88598": "iso8859-8",
    "win1250": "cp1250", "win1251": "cp1251", "win1252": "cp1252", "win1253": "cp1253",
    "win1254": "cp1254", "win1255": "cp1255", "win1256": "cp1256", "win1257": "cp1257",
    "win1258": "cp1258", "win866": "cp866", "win874": "cp874",
    "koi8r": "koi8-r", "koi8u": "koi8-u",
    "eucjp": "euc_jp", "euckr": "euc_kr", "euccn": "gb2312", "sjis": "cp932", "big5": "cp950",
    "gbk": "gbk", "uhc": "cp949", "gb18030": "gb18030", "johab": "johab",
}  # fmt: skip


def codec(name: str) -> str | None:
    """Return Python's name of the server's encoding `name`, or None when it is not known."""
    return _CODECS.get("".join(letter for letter in name.lower() if letter.isalnum()))


def read(raw: bytes, encoding: str | None) -> tuple[str, bool]:
    """Return (text, whether it is certain). What cannot be read is shown with escapes."""
    if encoding is not None:
        try:
            return raw.decode(encoding), True
        except UnicodeDecodeError:
            pass
    return text_of(raw), False


def whole_characters(raw: bytes) -> bytes:
    """Return UTF-8 bytes that were cut somewhere, without a character that is not whole."""
    for back in range(1, min(4, len(raw) + 1)):
        lead = raw[-back]
        if lead >= 0xC0:
            needs = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return raw[:-back] if needs > back else raw
        if lead < 0x80:
            break
    return raw
