"""Small wrong changes that a slip of the hand could make, found in a module's syntax tree."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAIRS = {
    ast.Lt: ("<", ">"),
    ast.Gt: (">", "<"),
    ast.LtE: ("<=", ">="),
    ast.GtE: (">=", "<="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
NAMES = {
    "max": "min",
    "min": "max",
    "mean": "sum",
    "sum": "mean",
    "argmax": "argmin",
    "argmin": "argmax",
    "any": "all",
    "all": "any",
    "idxmax": "idxmin",
    "idxmin": "idxmax",
    "nlargest": "nsmallest",
    "floor": "ceil",
    "ceil": "floor",
    "first": "last",
    "last": "first",
}
AXES = {"axis", "dim", "ddof", "correction", "keepdim"}
TYPES = {"float", "int", "bool", "str", "list", "dict", "tuple", "object"}
LOOKS = {  # flags that change no result
    "frozen", "flush", "daemon", "refresh", "auto_refresh", "no_args_is_help", "add_completion", "ensure_option",
    "pretty_exceptions_enable", "warn_on_full_buffer", "copy", "optimize", "highlight", "markup", "soft_wrap",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    "One change to one module."

    module: str  # path below the package, e.g. analysis/gain.py
    start: int  # first byte that is replaced
    end: int
    text: str  # what stands there instead
    what: str  # operator, e.g. "< to >"
    line: int
    source: str  # the line as it is, for the report
    lines: tuple[int, ...]  # of the statement that it stands in

    @property
    def kind(self) -> str:
        "The kind of slip: the first word of what it is, so that each kind has its share of a draw."
        first, *_, last = self.what.split()
        return {"to": "operator", "doubled": "number", "changed": "flag"}.get(
            self.what.split()[1] if last not in ("doubled", "changed") else last, first
        )

    @property
    def name(self) -> str:
        return f"{self.module}:{self.line} {self.what}: {self.source.strip()[:110]}"


def words(code: str, whole: bool = True) -> list[tuple[str, int, int]]:
    """The words and signs of code with their first and last byte, whatever its lines, spaces and quotes are.

    Comments of a whole module are left out, and so is a comma before a closing bracket.
    """
    raw = code
    if whole:
        lines = code.splitlines(keepends=True)
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                (row, start), (_, end) = token.start, token.end
                line = lines[row - 1]
                lines[row - 1] = line[:start] + " " * len(line[start:end].encode()) + line[end:]
        raw = "".join(lines)
    found, at, end = [], 0, 0
    for m in re.finditer(r"\w+|[^\w\s]", raw):
        at += len(raw[end : m.start()].encode())
        last = at + len(m[0].encode())
        if m[0] in ")]}" and found and found[-1][0] == ",":
            found.pop()
        found.append((m[0].replace("'", '"'), at, last))
        at, end = last, m.end()
    return found


def places(fragment: str, among: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    "Where the words of a fragment stand one after the other: first and last byte."
    text, sought = "\0".join(["", *(w for w, _, _ in among), ""]), "\0".join(w for w, _, _ in words(fragment, False))
    found, k = [], -1
    while (k := text.find(f"\0{sought}\0", k + 1)) >= 0:
        first = text.count("\0", 0, k)
        found.append((among[first][1], among[first + sought.count("\0")][2]))
    return found


def statement_lines(tree: ast.AST) -> dict[int, tuple[int, ...]]:
    "For each line the lines of the innermost statement that it belongs to, without the body of a compound one."
    found = {}
    for node in ast.walk(tree):  # the outer ones come first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            lines = tuple(range(node.lineno, last + 1))
            found |= dict.fromkeys(lines, lines)
    return found


PAINT = re.compile(
    r"(.*\.)?(mark_\w+|properties|configure\w*)|alt\.(Axis|Legend|value|Title|Header)|widgets\.\w+|time\.sleep"
)


def in_messages(tree: ast.AST) -> set[int]:
    "Nodes of which nothing but an error's sentence, an annotation or the size of a mark is made."
    skipped = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Raise):
            parts = [node]
        if isinstance(node, ast.JoinedStr):
            parts = [node]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation] + (
                [node.returns] if node.returns else []
            )
        if isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        if isinstance(node, ast.Call) and PAINT.fullmatch(ast.unparse(node.func)):
            parts = [*node.args, *(k.value for k in node.keywords), *node.keywords]
        skipped |= {id(n) for p in parts for n in ast.walk(p)}
    return skipped


def keys_beside(tree: ast.AST) -> dict[str, str]:
    "For each text that something is looked up by in a module, the next one of them."
    found = dict.fromkeys(
        n.slice.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant) and isinstance(n.slice.value, str)
    )
    return dict(zip(found, [*list(found)[1:], *list(found)[:1]])) if len(found) > 1 else {}


def mutants(root: Path, module: str) -> Iterator[Mutant]:
    "Every change that the operators can make to a module."
    code = (root / module).read_text(encoding="utf-8")
    lines = code.encode().splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    raw, tree = code.encode(), ast.parse(code)
    skipped, whole = in_messages(tree), statement_lines(tree)
    keys = keys_beside(tree)

    def at(line: int, column: int) -> int:
        return offsets[line - 1] + column

    def span(node: ast.AST) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def change(start: int, end: int, text: str, what: str, node: ast.AST) -> Mutant:
        line = raw[:start].count(b"\n") + 1
        return Mutant(module, start, end, text, what, line, lines[line - 1].decode(), whole.get(line, (line,)))

    def swap(left: ast.AST, right: ast.AST, operator: ast.AST, node: ast.AST) -> Iterator[Mutant]:
        "The operator between two nodes."
        if type(operator) not in PAIRS:
            return
        (_, start), (end, _) = span(left), span(right)
        old, new = PAIRS[type(operator)]
        found = raw[start:end].decode().find(old)
        if found < 0:
            return
        begin = start + len(raw[start:end].decode()[:found].encode())
        yield change(begin, begin + len(old.encode()), new, f"{old} to {new}", node)

    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        match node:
            case ast.Compare():
                for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                    yield from swap(left, right, operator, node)
            case ast.BinOp():
                if not any(
                    isinstance(n, ast.Constant) and isinstance(n.value, str) or isinstance(n, ast.JoinedStr)
                    for n in (node.left, node.right)
                ):
                    yield from swap(node.left, node.right, node.op, node)
                    if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
                        (_, start), (_, end) = span(node.left), span(node)
                        text = raw[start:end].decode()
                        if text.count("(") == text.count(")"):
                            yield change(start, end, "", "dropped term", node)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:]):
                    yield from swap(left, right, node.op, node)
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                start, word = span(node)[0], "-" if isinstance(node.op, ast.USub) else "not"
                yield change(start, start + len(word), "", f"{word} removed", node)
            case ast.Call():
                named = (
                    node.func.attr
                    if isinstance(node.func, ast.Attribute)
                    else node.func.id
                    if isinstance(node.func, ast.Name)
                    else ""
                )
                if named in NAMES:
                    end = span(node.func)[1]
                    yield change(end - len(named), end, NAMES[named], f"{named} to {NAMES[named]}", node)
                plain = len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2])
                alike = all(
                    isinstance(a, ast.Name | ast.Attribute | ast.Subscript) and ast.unparse(a) not in TYPES
                    for a in node.args[:2]
                )
                if plain and alike and named not in ("zip", "dict", "max", "min"):
                    (a, b), (c, d) = span(node.args[0]), span(node.args[1])
                    if raw[a:b] != raw[c:d]:
                        yield change(
                            a, d, (raw[c:d] + raw[b:c] + raw[a:b]).decode(), "first two arguments swapped", node
                        )
            case ast.Expr(value=ast.Call()):
                yield change(*span(node), "None", "removed call", node)
            case ast.Subscript(slice=ast.Constant(value=str() as key)) if key in keys:
                yield change(*span(node.slice), repr(keys[key]), f"key {key} to {keys[key]}", node.slice)
            case ast.Subscript(slice=ast.Constant(value=0)):
                yield change(*span(node.slice), "-1", "first to last", node.slice)
            case ast.Subscript(slice=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1))):
                yield change(*span(node.slice), "0", "last to first", node.slice)
            case ast.keyword(arg=str(name), value=ast.Constant(value=int() | bool() as value)) if (
                name in AXES or isinstance(value, bool) and name not in LOOKS
            ):
                start, end = span(node.value)
                yield change(
                    start,
                    end,
                    str(not value) if isinstance(value, bool) else str(1 - value),
                    f"{name}={value} changed",
                    node.value,
                )
            case ast.IfExp():
                (a, b), (c, d) = span(node.body), span(node.orelse)
                start, end = span(node.test)
                yield change(start, end, f"not ({raw[start:end].decode()})", "condition negated", node)
            case ast.Constant(value=float() as value) if value != 1.0 and abs(value) > 1e-5:
                start, end = span(node)
                yield change(start, end, repr(value * 2), f"{value} doubled", node)
