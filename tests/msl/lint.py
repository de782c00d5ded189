"""What Apple's compiler rejects and clang on a CPU takes: read from the source itself.

Address spaces, double and the version of C++ are checked by the compiler (see include/).
"""

from __future__ import annotations

import re

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)

RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("a lambda", re.compile(r"[=(,]\s*\[[&=\w\s,]*\]\s*\(")),
    (
        "a cast to a pointer in another address space",
        re.compile(
            r"\(\s*(?:const\s+)?(?:device|threadgroup|constant|thread|DEV|THR)\b[^()]*\*\s*\)"
        ),
    ),
    ("a static local", re.compile(r"^[ \t]+static\s+(?!METAL_FUNC|DEVFN|CONSTFN)(?!.*\()", re.M)),
    ("new, delete, throw, try or goto", re.compile(r"\b(?:new|delete|throw|try|goto)\b")),
    ("a virtual function", re.compile(r"\bvirtual\b")),
    ("dynamic_cast or typeid", re.compile(r"\b(?:dynamic_cast|typeid)\b")),
    ("thread_local or register", re.compile(r"\b(?:thread_local|register)\b")),
    ("a type of 64-bit float", re.compile(r"\b(?:double|long\s+double)\b")),
    ("a header of the C++ library", re.compile(r"#\s*include\s*<(?!metal)")),
    ("a buffer beyond the 31 of Metal", re.compile(r"\[\[buffer\((?:3[1-9]|[4-9]\d|\d{3,})\)\]\]")),
    ("a variable argument list", re.compile(r"\.\.\.\s*\)\s*\{")),
)

_FUNCTION = re.compile(r"\b(?:DEVFN|CONSTFN)\s[^;{}()]*?\b(\w+)\s*\([^{};]*\)\s*\{")


def check(source: str) -> list[str]:
    """One line for each problem in a Metal source."""
    text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    # nvcc's side of compat.h never reaches Apple's compiler.
    text = re.sub(
        r"#if defined\(__CUDACC__\).*?#else", lambda m: "\n" * m[0].count("\n"), text, flags=re.S
    )
    problems = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {name}"
        for name, pattern in RULES
        for match in pattern.finditer(text)
    ]
    return problems + _of_functions(text)


def _of_functions(text: str) -> list[str]:
    """Recursion, and threadgroup variables outside of a kernel's own body."""
    problems = []
    bodies = {}
    for match in _FUNCTION.finditer(text):
        body = text[match.end() : _end(text, match.end())]
        bodies.setdefault(match[1], "")
        bodies[match[1]] += body
        if re.search(r"\bTG_ARRAY\b|\bthreadgroup\s+\w+\s+\w+\s*\[", body):
            problems.append(f"{match[1]}: a threadgroup variable in a function")
    calls = {
        name: {other for other in bodies if re.search(rf"\b{other}\b\s*[<(]", body)}
        for name, body in bodies.items()
    }
    for name in calls:
        seen: set[str] = set()
        todo = set(calls[name])
        while todo:
            called = todo.pop()
            seen.add(called)
            todo |= calls[called] - seen
        if name in seen:
            problems.append(f"{name}: recursion")
    return problems


def _end(text: str, start: int) -> int:
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return at
    return len(text)
