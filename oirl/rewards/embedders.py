"""Embedders: texts to the rows of a matrix that reward models learn from.

An embedder works in three steps: `prepare` reads texts and learns nothing, `fit` learns weights (a vocabulary, say)
from prepared training texts, never from outcomes, and `embed` gives the matrix of prepared texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import scipy.sparse as sp

from oirl.errors import ConfigError, ModelFileError, require
from oirl.registry import load_attribute, names, resolve
from oirl.rewards.cache import cached_rows
from oirl.rewards.features import N_COUNTS, Grams, char_grams, parse, word_grams

Matrix: TypeAlias = "np.ndarray | sp.csr_matrix"
DEFAULT_SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_PROBE = "oirl checks with this sentence that an embedder is the one a model was trained with."


class Embedder(Protocol):
    """Turns texts into the rows of a matrix."""

    def prepare(self, texts: Sequence[str]) -> Any:
        """Read the texts."""
        ...

    def fit(self, prepared: Any) -> Any:
        """Learn from prepared training texts; returns self."""
        ...

    def embed(self, prepared: Any) -> Matrix:
        """Return one row per text, float32 (n, d), dense or CSR."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the embedder, for JSON."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the learned state."""
        ...


class TextFeatures:
    """Texts as n-grams of words, of the last sentence and of characters, and as counts.

    Attributes:
        blocks: Name -> n-grams.
        counts: Counts and sizes of numbers, lengths and cue words, float64 (n, c).
    """

    def __init__(self, blocks: dict[str, Grams], counts: np.ndarray) -> None:
        self.blocks = blocks
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)


class TfidfEmbedder:
    """Weighted n-grams with numbers masked, and counts: needs no model and no download.

    Blocks of word 1–3-grams and of word 1–3-grams of the last sentence, and on demand of character 3–4-grams, each
    weighted by (1 + log tf) · (log((1 + n) / (1 + df)) + 1) and scaled to length 1, beside the standardised counts of
    `oirl.rewards.features.parse`, scaled to be of length about 1 too.

    Args:
        min_df: An n-gram must stand in so many training texts.
        blocks: Which n-grams: any of "words", "last", "chars". Characters gain nothing on GSM8K and SVAMP and double
            the time (docs/prompt_models.md), so they are left out unless asked for.
    """

    name = "tfidf"
    ALL_BLOCKS = ("words", "last", "chars")

    def __init__(self, min_df: int = 2, blocks: Sequence[str] = ("words", "last")) -> None:
        for block in blocks:
            if block not in self.ALL_BLOCKS:
                raise ConfigError(f"unknown block {block!r} of tfidf; known: {', '.join(self.ALL_BLOCKS)}")
        self.min_df = min_df
        self.blocks = tuple(blocks)
        self._state: dict[str, np.ndarray] = {}

    def prepare(self, texts: Sequence[str]) -> TextFeatures:
        """Read the texts once."""
        parsed = [parse(t) for t in texts]
        blocks = {}
        for block in self.blocks:
            if block == "words":
                blocks[block] = word_grams([p.tokens for p in parsed])
            elif block == "last":
                blocks[block] = word_grams([p.last for p in parsed])
            else:
                blocks[block] = char_grams([p.tokens for p in parsed])
        return TextFeatures(blocks, np.array([p.counts for p in parsed]).reshape(len(parsed), N_COUNTS))

    def fit(self, prepared: TextFeatures) -> TfidfEmbedder:
        """Learn vocabularies, their weights, and the scale of the counts."""
        n = len(prepared)
        self._state = {}
        for name, grams in prepared.blocks.items():
            pairs = np.unique(np.stack([grams.hashes, grams.documents().astype(np.uint64)]), axis=1)
            hashes, df = np.unique(pairs[0], return_counts=True)
            kept = df >= min(self.min_df, n)
            self._state[f"{name}_hashes"] = hashes[kept]
            self._state[f"{name}_idf"] = (np.log((1 + n) / (1 + df[kept])) + 1).astype(np.float32)
        scale = prepared.counts.std(axis=0)
        self._state["counts_mean"] = prepared.counts.mean(axis=0)
        self._state["counts_scale"] = np.where(scale > 1e-9, scale, 1.0)
        return self

    def embed(self, prepared: TextFeatures) -> sp.csr_matrix:
        """Return the blocks and the counts side by side, float32 CSR (n, d)."""
        parts = [self.embed_block(prepared, name) for name in self.blocks]
        return sp.hstack([*parts, sp.csr_matrix(self.embed_counts(prepared))], format="csr", dtype=np.float32)

    def embed_block(self, prepared: TextFeatures, name: str) -> sp.csr_matrix:
        """Return one block of n-grams, float32 CSR, rows of length 1 (0 where no n-gram is known)."""
        vocabulary, idf = self._state[f"{name}_hashes"], self._state[f"{name}_idf"]
        grams = prepared.blocks[name]
        if not len(vocabulary):
            return sp.csr_matrix((len(grams), 0), dtype=np.float32)
        at = np.minimum(np.searchsorted(vocabulary, grams.hashes), len(vocabulary) - 1)
        known = vocabulary[at] == grams.hashes
        counts = sp.csr_matrix(
            (np.ones(known.sum(), dtype=np.float32), (grams.documents()[known], at[known])),
            shape=(len(grams), len(vocabulary)),
        )
        counts.sum_duplicates()
        counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
        row = np.repeat(np.arange(len(grams)), np.diff(counts.indptr))
        norm = np.sqrt(np.bincount(row, weights=counts.data**2, minlength=len(grams)))
        counts.data = (counts.data / norm[row]).astype(np.float32)
        return counts

    def embed_counts(self, prepared: TextFeatures) -> np.ndarray:
        """Return the standardised counts, cut at ±5 and divided by √c, float32 (n, c)."""
        z = (prepared.counts - self._state["counts_mean"]) / self._state["counts_scale"]
        return (np.clip(z, -5, 5) / np.sqrt(max(z.shape[1], 1))).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """Return name and parameters."""
        return {"name": self.name, "min_df": self.min_df, "blocks": list(self.blocks)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return vocabularies and weights."""
        return dict(self._state)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> TfidfEmbedder:
        """Take the state that `arrays` gave."""
        wanted = [f"{b}_{part}" for b in self.blocks for part in ("hashes", "idf")]
        wanted += ["counts_mean", "counts_scale"]
        self._state = {name: arrays[name] for name in wanted}
        for block in self.blocks:
            if self._state[f"{block}_hashes"].shape != self._state[f"{block}_idf"].shape:
                raise ValueError("its vocabulary does not match its weights")
        return self


class DenseRows:
    """Rows of a dense matrix that were computed once."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)


class DenseEmbedder:
    """An embedder that learns nothing: a function from texts to vectors, its results cached on disk.

    Args:
        function: Texts to an array (n, d).
        name: What the manifest says; None for a function that cannot be named.
        cache_key: Name of the cache; None to compute anew each time.
    """

    def __init__(
        self,
        function: Callable[[list[str]], Any],
        name: str | None = None,
        cache_key: str | None = None,
    ) -> None:
        self.name = name or getattr(function, "__qualname__", "a callable")
        self._function = function
        self._cache_key = cache_key

    def prepare(self, texts: Sequence[str]) -> DenseRows:
        """Compute the vectors, or take them from the cache.

        Raises:
            ConfigError: If the function does not return one finite vector per text.
        """
        if not texts:
            return DenseRows(np.zeros((0, len(self._probe())), dtype=np.float32))
        return DenseRows(cached_rows(self._cache_key, texts, self._compute))

    def fit(self, prepared: DenseRows) -> DenseEmbedder:
        """Do nothing."""
        return self

    def embed(self, prepared: DenseRows) -> np.ndarray:
        """Return the vectors, float32 (n, d)."""
        return prepared.matrix

    def describe(self) -> dict[str, Any]:
        """Return the name and the first numbers of a probe's vector, by which a later load is checked."""
        probe = self._probe()
        return {"name": self.name, "dimension": len(probe), "probe": [float(v) for v in probe[:8]]}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return nothing: there is no state."""
        return {}

    def check(self, description: Mapping[str, Any]) -> None:
        """Raise `ModelFileError` unless this embedder gives the vectors that the manifest describes."""
        probe = self._probe()
        same = len(probe) == description["dimension"] and np.allclose(
            probe[: len(description["probe"])], description["probe"], atol=1e-3
        )
        if not same:
            raise ModelFileError(
                f"the embedder {self.name!r} gives other vectors than the one this model was trained with "
                f"({description['name']!r}); name the same model, in the same version"
            )

    def _probe(self) -> np.ndarray:
        # Never from the cache, which may hold vectors of a model that stood under this name before.
        return self._compute([_PROBE])[0]

    def _compute(self, texts: list[str]) -> np.ndarray:
        try:
            vectors = np.asarray(self._function(texts), dtype=np.float32)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"the embedder {self.name!r} does not turn a list of texts into an array: {e}") from e
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ConfigError(
                f"the embedder {self.name!r} returned an array of shape {vectors.shape} for {len(texts)} texts; "
                "one vector per text is needed"
            )
        if not np.isfinite(vectors).all():
            raise ConfigError(f"the embedder {self.name!r} returned values that are not finite")
        return vectors


class SentenceEmbedder(DenseEmbedder):
    """Vectors of a sentence-transformers model, computed when first needed and cached on disk.

    Args:
        model: Name on the model hub, or a local folder.
    """

    def __init__(self, model: str = DEFAULT_SENTENCE_MODEL) -> None:
        require("sentence_transformers", "embed", "the embedder 'sentence-transformers'")
        self._model_name = model
        self._model: Any = None
        key = f"sentence-transformers-{model}-{folder_state(Path(model))}"
        super().__init__(self._encode, f"sentence-transformers:{model}", key)

    def _encode(self, texts: list[str]) -> np.ndarray:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            try:
                self._model = SentenceTransformer(self._model_name)
            except Exception as e:  # the hub client raises many kinds, none of them ours
                raise ConfigError(
                    f"cannot load the sentence-transformers model {self._model_name!r}: {str(e).splitlines()[0]}; "
                    "name a local folder where no hub can be reached"
                ) from e
        return self._model.encode(texts, batch_size=64, show_progress_bar=False, normalize_embeddings=True)


def folder_state(folder: Path) -> str:
    """Return a mark of a local folder's files, so that vectors of an earlier content are not taken for its own."""
    if not folder.is_dir():
        return ""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return ",".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def make_embedder(spec: str | Callable[[list[str]], Any] | Embedder) -> Any:
    """Return an embedder for a name, `name:model`, `package.module:function`, a callable or an embedder.

    An embedder that is given is copied before it learns anything, so that two models can be given the same one.

    Raises:
        UnknownNameError: If the name is not registered.
        ConfigError: If what is named or given is no embedder.
    """
    if not isinstance(spec, str):
        if hasattr(spec, "prepare"):
            return spec if isinstance(spec, DenseEmbedder) else copy.deepcopy(spec)
        if not callable(spec):
            raise ConfigError(f"the embedder is a {type(spec).__name__}; a name, a function or an embedder is needed")
        return DenseEmbedder(spec)
    name, _, argument = spec.partition(":")
    if name == TfidfEmbedder.name and argument:
        raise ConfigError(f"--embedder {spec}: tfidf takes no model; write tfidf")
    if name in names("embedders"):
        factory = resolve("embedders", name)
        if name == "hidden-states" and not argument:
            raise ConfigError("--embedder hidden-states: name a model, as hidden-states:MODEL")
        return factory(argument) if argument else factory()
    if ":" in spec:
        function = load_attribute(spec)
        if not callable(function):
            raise ConfigError(f"the embedder {spec} is a {type(function).__name__}, not a function of texts")
        return DenseEmbedder(function, spec)
    return resolve("embedders", spec)  # not registered: the error lists what is


def restore_embedder(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray], given: Any = None) -> Any:
    """Return the embedder that a manifest describes; code named by the manifest is never imported.

    Args:
        description: What `describe` gave.
        arrays: What `arrays` gave.
        given: The embedder, or its name, if it is not one that oirl can make by itself.

    Raises:
        ModelFileError: If the embedder has to be given and is not, or is another one.
    """
    name = str(description["name"])
    if name == TfidfEmbedder.name:
        if given is not None and given != TfidfEmbedder.name:
            raise ModelFileError(f"the model was trained with the embedder 'tfidf', not {given!r}; leave it out")
        return TfidfEmbedder(description["min_df"], description["blocks"]).restore(arrays)
    if given is None and not name.startswith(("sentence-transformers:", "hidden-states:")):
        raise ModelFileError(
            f"the model was trained with the embedder {name!r}, which is code of your own: pass it with "
            "embedder=… (in Python) or --embedder package.module:function"
        )
    embedder = make_embedder(name if given is None else given)
    if isinstance(embedder, DenseEmbedder):
        embedder.check(description)
    elif embedder.describe() != dict(description):
        raise ModelFileError(f"the embedder given is not the one that the model was trained with ({name!r})")
    elif hasattr(embedder, "restore"):
        embedder.restore(arrays)
    return embedder
