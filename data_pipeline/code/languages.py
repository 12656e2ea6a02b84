"""The table of languages: how a file is told, how it comments, what its tests are called, which grammar parses it."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Language:
    """One language.

    suffixes: endings of file names, lower case; line_comment, block_comment: how comments begin (and end); tests:
    pattern of a test file's path; grammar: (package, function) of a tree-sitter grammar; functions: node types that
    define a function; trivial: pattern of a line that does nothing worth learning; dialect: the language that a file
    of this ending may be in as well.
    """

    name: str
    suffixes: tuple[str, ...]
    line_comment: str | None = None
    block_comment: tuple[str, str] | None = None
    tests: re.Pattern[str] | None = None
    grammar: tuple[str, str] | None = None
    functions: frozenset[str] = field(default_factory=frozenset)
    trivial: re.Pattern[str] | None = None
    preprocessor: bool = False
    dialect: str | None = None


_SLASHES = ("/*", "*/")
# A folder of tests, in any language.
TEST_FOLDER = re.compile(r"(^|/)(tests?|testing|__tests__|spec|testdata)/")

LANGUAGES = (
    Language(
        "python",
        (".py", ".pyi"),
        "#",
        tests=re.compile(r"(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$"),
        functions=frozenset({"FunctionDef", "AsyncFunctionDef"}),
        trivial=re.compile(r"^\s*(pass|\.\.\.|print\(.*\)|assert\b.*|import\b.*)$"),
    ),
    Language(
        "c",
        (".c", ".h"),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)(test_[^/]*|[^/]*_test)\.[ch]$"),
        grammar=("tree_sitter_c", "language"),
        functions=frozenset({"function_definition"}),
        trivial=re.compile(r"^\s*(;|printf\(.*\);|assert\(.*\);|break;)$"),
        preprocessor=True,
        dialect="cpp",
    ),
    Language(
        "cpp",
        (".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh"),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)(test_[^/]*|[^/]*_(unit)?test)\.[a-z]+$"),
        grammar=("tree_sitter_cpp", "language"),
        functions=frozenset({"function_definition", "lambda_expression"}),
        trivial=re.compile(r"^\s*(;|(std::)?(printf|cout)\b.*;|assert\(.*\);|break;)$"),
        preprocessor=True,
    ),
    Language(
        "java",
        (".java",),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)[^/]*(Test|Tests|IT)\.java$"),
        grammar=("tree_sitter_java", "language"),
        functions=frozenset({"method_declaration", "constructor_declaration"}),
        trivial=re.compile(r"^\s*(;|System\.out\.print.*;|assert\b.*;|break;|import\b.*;)$"),
    ),
    Language(
        "javascript",
        (".js", ".jsx", ".mjs", ".cjs"),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)[^/]*\.(test|spec)\.[cm]?jsx?$"),
        grammar=("tree_sitter_javascript", "language"),
        functions=frozenset(
            {"function_declaration", "function_expression", "generator_function_declaration", "method_definition"}
            | {"arrow_function"}
        ),
        trivial=re.compile(r"^\s*(;|console\.\w+\(.*\);?|assert\b.*|break;)$"),
    ),
    Language(
        "typescript",
        (".ts", ".tsx"),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)[^/]*\.(test|spec)\.tsx?$"),
        grammar=("tree_sitter_typescript", "language_typescript"),
        functions=frozenset(
            {"function_declaration", "function_expression", "generator_function_declaration", "method_definition"}
            | {"arrow_function"}
        ),
        trivial=re.compile(r"^\s*(;|console\.\w+\(.*\);?|assert\b.*|break;)$"),
    ),
    Language(
        "go",
        (".go",),
        "//",
        _SLASHES,
        tests=re.compile(r"_test\.go$"),
        grammar=("tree_sitter_go", "language"),
        functions=frozenset({"function_declaration", "method_declaration", "func_literal"}),
        trivial=re.compile(r"^\s*(fmt\.Print.*|break)$"),
    ),
    Language(
        "rust",
        (".rs",),
        "//",
        _SLASHES,
        tests=re.compile(r"(^|/)(tests?|[^/]*_test)\.rs$"),
        grammar=("tree_sitter_rust", "language"),
        functions=frozenset({"function_item", "closure_expression"}),
        trivial=re.compile(r"^\s*(println!\(.*\);|assert(_eq)?!\(.*\);|break;)$"),
    ),
    Language("shell", (".sh", ".bash"), "#", trivial=re.compile(r"^\s*(echo\b.*|:|true)$")),
    Language("ruby", (".rb",), "#", tests=re.compile(r"_(test|spec)\.rb$")),
    Language("php", (".php",), "//", _SLASHES, tests=re.compile(r"Test\.php$")),
    Language("kotlin", (".kt", ".kts"), "//", _SLASHES, tests=re.compile(r"Test\.kt$")),
    Language("scala", (".scala",), "//", _SLASHES, tests=re.compile(r"(Test|Spec|Suite)\.scala$")),
    Language("swift", (".swift",), "//", _SLASHES, tests=re.compile(r"Tests?\.swift$")),
    Language("csharp", (".cs",), "//", _SLASHES, tests=re.compile(r"Tests?\.cs$")),
    Language("lua", (".lua",), "--"),
    Language("sql", (".sql",), "--", _SLASHES),
    Language("haskell", (".hs",), "--", ("{-", "-}")),
    Language("julia", (".jl",), "#"),
    Language("r", (".r",), "#"),
    Language("perl", (".pl", ".pm"), "#"),
    Language("json", (".json",)),
    Language("toml", (".toml",), "#"),
    Language("xml", (".xml",), None, ("<!--", "-->")),
    Language("yaml", (".yaml", ".yml"), "#"),
    Language("cmake", (".cmake",), "#"),
    Language("markdown", (".md", ".markdown")),
    Language("restructuredtext", (".rst",)),
)
_BY_SUFFIX = {suffix: language for language in LANGUAGES for suffix in language.suffixes}
_BY_NAME = {language.name: language for language in LANGUAGES}


def language_of(path: str) -> Language | None:
    """The language of a file by its name; None for names that the table doesn't know."""
    return _BY_SUFFIX.get(PurePosixPath(path.lower()).suffix)


def language_named(name: str) -> Language | None:
    """The language of a name in the table."""
    return _BY_NAME.get(name)


@cache
def suffixes() -> tuple[str, ...]:
    """Every ending that the table knows."""
    return tuple(_BY_SUFFIX)


def is_test(path: str, language: Language | None) -> bool:
    """Whether a file holds tests, by its path."""
    named = language is not None and language.tests is not None and language.tests.search(path) is not None
    return named or TEST_FOLDER.search(path) is not None


def comment_line(language: Language | None, text: str) -> str:
    """A line of a file's own comments."""
    if language is not None and language.line_comment:
        return f"{language.line_comment} {text}"
    if language is not None and language.block_comment:
        begin, end = language.block_comment
        return f"{begin} {text} {end}"
    return text
