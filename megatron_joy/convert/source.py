"""What a conversion starts from: a checkpoint, the recipe inside it, and the tokenizer of its data."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_joy.checkpoint.find import latest, open_checkpoint
from megatron_joy.checkpoint.marker import Checkpoint
from megatron_joy.checkpoint.work_folder import CHECKPOINTS
from megatron_joy.convert.hf_config import SpecialTokens
from megatron_joy.data.manifest import TOKENIZER_FOLDER, load_manifest, manifest_path
from megatron_joy.errors import UserError
from megatron_joy.recipe import Recipe, load_recipe
from megatron_joy.recipe.timetable import as_of

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a model folder takes along; nothing else is copied, code least of all.
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """A whole checkpoint and its recipe; `notes` say what was passed over to find it."""

    checkpoint: Checkpoint
    recipe: Recipe
    notes: tuple[str, ...] = ()


def open_source(path: Path, full: bool = False) -> Source:
    """A checkpoint folder, or the newest whole checkpoint of a run folder. full: every file's content is checked.

    Raises UserError when there is none.
    """
    notes: tuple[str, ...] = ()
    if (path / CHECKPOINTS).is_dir():
        choice = latest(path / CHECKPOINTS, full)
        notes = choice.notes
        if choice.checkpoint is None:
            told = f" ({notes[0]})" if notes else ""
            raise UserError(f"{path / CHECKPOINTS}: holds no whole checkpoint{told}; train longer or name another run")
        checkpoint = choice.checkpoint
    else:
        checkpoint = open_checkpoint(path, full)
    return Source(checkpoint, as_of(load_recipe(str(checkpoint.recipe_path)), checkpoint.marker.step), notes)


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with tokenizer.json, and the id that ends a document where the training data says it."""

    path: Path
    eod: int | None = None

    def load(self) -> Tokenizer:
        """The tokenizer. Raises UserError when there is none or the library can't load it."""
        path = self.path / TOKENIZER_JSON
        if not path.is_file():
            raise UserError(f"{path}: not there; name a folder that has it with --tokenizer")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: the tokenizers library cannot load it ({error})") from None

    def special_tokens(self, tokenizer: Tokenizer) -> SpecialTokens:
        """Ids of the tokens that tokenizer_config.json names; the data's own end of a document wins over its eos."""
        config = _json_object(self.path / TOKENIZER_CONFIG)

        def id_of(name: str) -> int | None:
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            return tokenizer.token_to_id(text) if isinstance(text, str) else None

        eos = id_of("eos_token") if self.eod is None else self.eod
        return SpecialTokens(id_of("bos_token"), eos, id_of("pad_token"))


def _json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file that can be read") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write the tokenizer's folder again") from None
    return content if isinstance(content, dict) else {}


def tokenizer_of(recipe: Recipe, given: Path | None) -> TokenizerFolder | None:
    """The tokenizer to write beside the weights: the given one, the recipe's, or the copy beside its training shards.

    None when the recipe names no data at all. Raises UserError when what it names is not there (paths of a recipe start
    where the run was started), or when its vocabulary is larger than the model's.
    """
    eod = None
    if given is not None:
        folder = given
    elif recipe.data.tokenizer is not None:
        folder = Path(recipe.data.tokenizer)
    elif recipe.data.train:
        manifest = recipe.data.train[0].manifest
        folder = manifest_path(manifest).parent / TOKENIZER_FOLDER
        if folder.is_dir():
            eod = load_manifest(manifest).tokenizer.eod_id
    else:
        return None
    if not (folder / TOKENIZER_JSON).is_file():
        if given is not None:
            raise UserError(f"{folder / TOKENIZER_JSON}: not there; --tokenizer names a folder that has it")
        raise UserError(
            f"{folder / TOKENIZER_JSON}: not there, though the checkpoint's recipe was trained with it; "
            "call from where the run was started, or name the tokenizer's folder with --tokenizer"
        )
    return TokenizerFolder(folder, eod)


def check_vocabulary(folder: TokenizerFolder, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raises UserError when the tokenizer has ids that the embedding has no row for."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"{folder.path / TOKENIZER_JSON}: has ids up to {largest}, the model's end at {vocabulary - 1}; "
            "name the tokenizer that the model was trained with"
        )
