"""Which files of a repository a file imports, found by text alone: a light graph for each language.

Only imports of files in the same repository are edges. What cannot be resolved (libraries, generated files, names made
at run time) is no edge; a wrong edge is worse than none, since it would order files the wrong way.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from data_pipeline.code.languages import language_of


@dataclass(frozen=True)
class Repository:
    """The files of a repository by their path, by their last part and by their folder."""

    name: str
    files: Mapping[str, str]
    by_tail: Mapping[str, tuple[str, ...]]
    folders: Mapping[str, tuple[str, ...]]

    def ending_with(self, tail: str, near: str, root: Callable[[str], bool] = lambda folder: True) -> str | None:
        """The one file whose path ends with these parts, below a folder for which `root` holds; of several the one that
        shares most folders with `near`.
        """
        name = tail.rpartition("/")[2]
        found = [
            path
            for path in self.by_tail.get(name, ())
            if (path == tail or path.endswith(f"/{tail}")) and root(path[: -len(tail)].rstrip("/"))
        ]
        if not found:
            return None
        return min(found, key=lambda path: (-len(posixpath.commonpath([near, path]).split("/")), len(path), path))


def index(name: str, files: Mapping[str, str]) -> Repository:
    """Prepares files (path with `/` from the repository's root -> text) for looking up."""
    tails: dict[str, list[str]] = defaultdict(list)
    folders: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files):
        tails[path.rpartition("/")[2]].append(path)
        folders[posixpath.dirname(path)].append(path)
    return Repository(
        name,
        files,
        {tail: tuple(paths) for tail, paths in tails.items()},
        {folder: tuple(paths) for folder, paths in folders.items()},
    )


DEEPEST = 64  # folders; a longer path is none of a repository, and each of its parts costs a look
# Only at the left margin: an import in a function or under TYPE_CHECKING is usually there to avoid a cycle.
# A list in brackets ends before another bracket opens: a file of open ones is looked at once, not once for each.
_PYTHON_FROM = re.compile(
    r"^from[ \t]++(\.*+)([\w.]*+)[ \t]++import[ \t]++(\((?:[^()#]++|#[^\n]*+)*+\)|[^\n#]+)", re.MULTILINE
)
_COMMENT = re.compile(r"#[^\n]*")
_PYTHON_IMPORT = re.compile(r"^import[ \t]+([^\n#;]+)", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+["<]([^">\n]+)[">]', re.MULTILINE)
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)", re.MULTILINE)
_SCRIPT = re.compile(r"""(?:\bfrom|\bimport|\brequire\s*\(|\bimport\s*\()\s*["'](\.{1,2}/[^"'\n]+)["']""")
_GO = re.compile(r'^[ \t]*(?:import[ \t]+)?(?:[\w.]+[ \t]+)?"([\w./\-]+)"[ \t]*$', re.MULTILINE)
_RUST_MOD = re.compile(r"^[ \t]*(?:pub(?:\([^)\n]*\))?[ \t]+)?mod[ \t]+(\w+)[ \t]*;", re.MULTILINE)
_RUST_USE = re.compile(r"\buse[ \t]+(crate|super|self)((?:::\w+)+)")


def _python_module(parts: list[str], repository: Repository, near: str) -> str | None:
    """The file of a module by its dotted parts, a module or a package; the repository may itself be the package."""

    def is_root(folder: str) -> bool:
        """Modules are found from folders that are no packages: `json` is not some package's json.py."""
        return posixpath.join(folder, "__init__.py") not in repository.files

    stem = "/".join(parts)
    for tail in (f"{stem}.py", f"{stem}/__init__.py", f"{stem}.pyi"):
        found = repository.ending_with(tail, near, is_root)
        if found is not None:
            return found
    return _python_at("", parts[1:], repository) if parts[0] == repository.name else None


def _python_at(folder: str, parts: list[str], repository: Repository) -> str | None:
    stem = posixpath.join(folder, *parts) if parts else folder
    for path in (f"{stem}.py", posixpath.join(stem, "__init__.py"), f"{stem}.pyi"):
        if path in repository.files:
            return path
    return None


def _names(text: str) -> Iterator[str]:
    """The names of an import list, without what they are called here."""
    for name in _COMMENT.sub("", text).strip("() \n\t").split(","):
        name = name.split(" as ")[0].strip()
        if name and name != "*":
            yield name


def _python(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    for dots, module, names in _PYTHON_FROM.findall(text):
        parts = [part for part in module.split(".") if part]
        if dots:
            folder = posixpath.dirname(path)
            for _ in dots[1:]:
                folder = posixpath.dirname(folder)
            yield _python_at(folder, parts, repository) if parts else None
            yield from (_python_at(folder, [*parts, name], repository) for name in _names(names))
            continue
        yield _python_module(parts, repository, path)
        yield from (_python_module([*parts, name], repository, path) for name in _names(names))
    for modules in _PYTHON_IMPORT.findall(text):
        yield from (_python_module(name.split("."), repository, path) for name in _names(modules))


def _c(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    for name in _INCLUDE.findall(text):
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        yield beside if beside in repository.files else repository.ending_with(posixpath.normpath(name), path)


def _java(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    for name in _JAVA.findall(text):
        parts = name.rstrip(".").split(".")
        # The class, or for a static import or a nested class what is before the last name.
        yield repository.ending_with("/".join(parts) + ".java", path)
        if len(parts) > 1:
            yield repository.ending_with("/".join(parts[:-1]) + ".java", path)


def _script(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    for name in _SCRIPT.findall(text):
        stem = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        endings = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".cjs", "/index.ts", "/index.tsx", "/index.js")
        bare = re.sub(r"\.[cm]?jsx?$", "", stem)  # TypeScript imports its own files as .js
        candidates = [stem + ending for ending in endings] + [bare + ending for ending in (".ts", ".tsx")]
        yield next((candidate for candidate in candidates if candidate in repository.files), None)


def _go(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    """A Go import names a folder; every file of its package that is no test is imported."""
    for name in _GO.findall(text):
        parts = name.split("/")[-DEEPEST:]
        # The longest tail of the import path that is a folder here; a module's name is outside the repository.
        for first in range(len(parts)):
            folder = "/".join(parts[first:])
            members = [member for member in repository.folders.get(folder, ()) if member.endswith(".go")]
            if members:
                yield from (member for member in members if not member.endswith("_test.go"))
                break


def _rust(path: str, text: str, repository: Repository) -> Iterator[str | None]:
    folder, name = posixpath.split(path)
    inside = folder if name in ("mod.rs", "lib.rs", "main.rs") else posixpath.join(folder, name[: -len(".rs")])
    for module in _RUST_MOD.findall(text):
        yield _rust_file(inside, [module], repository)
    root = path.split("src/")[0] + "src" if "src/" in path else folder
    starts = {"crate": root, "self": inside, "super": posixpath.dirname(inside)}
    for start, names in _RUST_USE.findall(text):
        parts = names.strip(":").split("::")[:DEEPEST]
        # The longest leading part that is a file; the rest are names in it.
        for end in range(len(parts), 0, -1):
            found = _rust_file(starts[start], parts[:end], repository)
            if found is not None:
                yield found
                break


def _rust_file(folder: str, parts: list[str], repository: Repository) -> str | None:
    stem = posixpath.join(folder, *parts)
    return next((path for path in (f"{stem}.rs", f"{stem}/mod.rs") if path in repository.files), None)


_FINDERS: dict[str, Callable[[str, str, Repository], Iterable[str | None]]] = {
    "python": _python,
    "c": _c,
    "cpp": _c,
    "java": _java,
    "kotlin": _java,
    "scala": _java,
    "javascript": _script,
    "typescript": _script,
    "go": _go,
    "rust": _rust,
}


def imports_of(name: str, files: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """For each file of a repository (path -> text) the files of the repository that it imports, itself never."""
    repository = index(name, files)
    found: dict[str, frozenset[str]] = {}
    for path, text in files.items():
        language = language_of(path)
        finder = _FINDERS.get(language.name) if language else None
        targets = finder(path, text, repository) if finder else ()
        found[path] = frozenset(target for target in targets if target is not None and target != path)
    return found
