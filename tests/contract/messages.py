"""PostgreSQL messages, read and made independently of the code under test."""


def messages(data):
    """Return ([(type, body)], the rest that is no whole message)."""
    found, at = [], 0
    while at + 5 <= len(data):
        length = int.from_bytes(data[at + 1 : at + 5], "big")
        if at + 1 + length > len(data):
            break
        found.append((chr(data[at]), data[at + 5 : at + 1 + length]))
        at += 1 + length
    return found, data[at:]


def message(kind, *parts):
    """Return a message: str parts end with a zero byte, (number, size) are big-endian."""
    body = b""
    for part in parts:
        if isinstance(part, str):
            body += part.encode() + b"\0"
        elif isinstance(part, tuple):
            number, size = part
            body += number.to_bytes(size, "big", signed=number < 0)
        else:
            body += part
    return kind.encode() + (len(body) + 4).to_bytes(4, "big") + body


def startup(version=(3, 0), **parameters):
    """Return a StartupMessage."""
    body = (version[0] << 16 | version[1]).to_bytes(4, "big")
    for name, value in parameters.items():
        body += name.encode() + b"\0" + value.encode() + b"\0"
    body += b"\0"
    return (len(body) + 4).to_bytes(4, "big") + body
