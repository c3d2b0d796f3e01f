"""Many trained adapters on one encoder, with what their runs know of tasks, labels and texts."""

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptv2_fast.adapters.bank import PrefixBank
from ptv2_fast.adapters.bank_members import Member
from ptv2_fast.files import read_json_object
from ptv2_fast.training import run_folder
from ptv2_fast.training.bank_batches import AdapterExamples, join_batches
from ptv2_fast.training.models import open_run
from ptv2_fast.training.predictions import BoundTask
from ptv2_fast.training.pretrained import fit_inputs, load_tokenizer
from ptv2_fast.training.run_lookup import locate


class AdapterBank(PrefixBank):
    """Many adapters on one frozen encoder: one batch may ask for another one in each row.

    A row gives what its adapter gives alone, beyond rounding, whatever stands beside it. Prefixes
    may differ in length and layers, heads in their task and labels. Adapters can be loaded and
    unloaded while other threads run the bank: a forward works with those that are there when it
    starts.

    Args:
        model: any supported encoder, bare or with a head, which is ignored. It is moved, frozen and
            put in eval mode; the bank works on its weights, so leave them as they are.
        device, dtype: to move it to; None = as it is.
        backbone: "auto", "frozen" or "hook", as in PTuningV2Config.

    Raises:
        ValueError: as `attach`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backbone: str = "auto",
    ) -> None:
        super().__init__(model, device, dtype, backbone)
        # Runs on one encoder have the same tokenizer, which takes more memory than an adapter.
        self._tokenizers: weakref.WeakValueDictionary[str, PreTrainedTokenizerBase]
        self._tokenizers = weakref.WeakValueDictionary()
        self._tokenizing = threading.Lock()  # a call sets how a tokenizer cuts texts

    def load(
        self,
        name: str,
        folder: str | os.PathLike,
        is_trainable: bool = False,
        changes: dict[str, Any] | None = None,
    ) -> None:
        """Load the adapter in a folder.

        Args:
            name: by which rows ask for it, `[A-Za-z0-9_.-]{1,128}`.
            folder: of an adapter, a checkpoint of one, or a run of `ptv2-fast train` by p-tuning-v2
                (its labels, lengths and decoding come along, for `predict`).
            is_trainable: keep the MLP of a prefix that has one, so that it can train; otherwise it
                is folded into a table.
            changes: data options to use instead of the run's, as for `load_run`.

        Raises:
            ValueError: for a bad name, or one that is there already; for missing, corrupt or
                truncated files, a run of another method, an adapter of another encoder (naming each
                difference), infinite numbers or NaN.
        """
        self._check_new(name)
        if not isinstance(folder, str | os.PathLike):
            raise ValueError(f"folder: expected a path, got {folder!r:.100}")
        folder = Path(folder)
        try:
            if locate(folder).run is None:
                super().load(name, folder, is_trainable)
            else:
                self._load_run(name, folder, is_trainable, changes)
        except OSError as error:
            raise ValueError(f"{folder}: {error}") from error

    def _load_run(
        self, name: str, folder: Path, is_trainable: bool, changes: dict[str, Any] | None
    ) -> None:
        opened = open_run(folder, changes)
        task, labels = opened.task, opened.labels
        if opened.config.model.method != "p-tuning-v2":
            raise ValueError(
                f"{folder}: expected a run of p-tuning-v2, got one of {opened.config.model.method}"
            )
        tokenizer = self._tokenizer(opened.folder / run_folder.TOKENIZER)

        def adapt(model: PreTrainedModel) -> None:
            fit_inputs(model, tokenizer)
            task.adapt_model(model, tokenizer, labels)

        run = BoundTask(task, labels, tokenizer, opened.max_length)
        self._load(name, opened.adapter, is_trainable, adapt, run)

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """That of a run, shared with the runs that have the same one."""
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*")) if folder.is_dir() else []:
            content = file.read_bytes()
            if file.name == "tokenizer.json":
                whole = read_json_object(file)  # truncation and padding are those of its last call
                kept = {n: part for n, part in whole.items() if n not in ("truncation", "padding")}
                content = json.dumps(kept).encode()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
        key = digest.hexdigest()
        found = self._tokenizers.get(key)
        if found is None:
            found = self._tokenizers[key] = load_tokenizer(folder)
        return found

    def labels(self, name: str) -> list[str] | None:
        """As that of `PrefixBank`; label words that a language model's head fills in are labels."""
        member = self._find(self._members, name)
        if member.run_of is not None and type(member.model).__name__.endswith("ForMaskedLM"):
            return list(member.run_of.labels)
        return member.labels

    @torch.no_grad()
    def predict(
        self,
        texts: Sequence[str],
        adapters: str | Sequence[str | Sequence[str]],
        batch_size: int = 32,
    ) -> list[Any]:
        """What `ptv2-fast predict` prints, for texts of any of the adapters.

        Texts that several adapters read in the same words run once below the lowest layer with a
        prefix; adapters with a prefix in layer 0 share their embeddings only.

        Args:
            texts: typed as for `ptv2-fast predict`; a pair has a tab between its parts.
            adapters: one for all texts, or one for each; or several for a text, in a list.
            batch_size: rows of a pass: one for each text and adapter, or part of a long text.

        Returns:
            A dictionary for each text, or a list of them where it has a list of adapters.

        Raises:
            ValueError: for an unknown adapter, one that comes from no run, or a text that does not
                fit its task.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts: expected a list of texts, got {texts!r:.100}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        wanted = [adapters] * len(texts) if isinstance(adapters, str) else list(adapters)
        if len(wanted) != len(texts):
            raise ValueError(
                f"adapters: expected one, or one for each of {len(texts)} texts, got {len(wanted)}"
            )
        members = self._members
        asked: dict[str, list[int]] = {}
        for number, names in enumerate(wanted):
            for name in [names] if isinstance(names, str) else names:
                if self._find(members, name).run_of is None:
                    raise ValueError(
                        f"adapters: expected those of runs, got {name!r}, which is an adapter "
                        "alone: it does not say how its task reads texts; call the bank itself"
                    )
                asked.setdefault(name, []).append(number)
        if self._shared.model.training:
            raise ValueError("adapters: expected a bank that does not train; call train_mode()")
        with self._tokenizing:
            parts = [
                _typed_examples(name, members[name].run_of, [texts[number] for number in numbers])
                for name, numbers in asked.items()
            ]
        self._run_parts(members, parts, batch_size)
        lines = {
            part.name: dict(zip(asked[part.name], part.lines(), strict=True)) for part in parts
        }
        return [
            lines[names][number] if isinstance(names, str) else [lines[n][number] for n in names]
            for number, names in enumerate(wanted)
        ]

    def run_of(self, name: str) -> BoundTask:
        """What the run of an adapter says about its texts.

        Raises:
            ValueError: for an unknown adapter, and one that comes from no run.
        """
        run = self._find(self._members, name).run_of
        if run is None:
            raise ValueError(f"{name}: expected the adapter of a run, got an adapter alone, which "
                             "does not say how its task reads texts")  # fmt: skip
        return run

    @torch.no_grad()
    def run_parts(self, parts: Sequence[AdapterExamples], batch_size: int) -> None:
        """Run examples of several adapters together; each part then has its results.

        Args:
            parts: of adapters by their `run_of`.
            batch_size: rows of a pass.

        Raises:
            ValueError: for a part whose adapter has been unloaded, or replaced.
        """
        members = self._members
        for part in parts:
            if part.name not in members or members[part.name].run_of is not part.run:
                raise ValueError(f"{part.name}: expected an adapter that is still loaded")
        self._run_parts(members, parts, batch_size)

    def _run_parts(
        self, members: dict[str, Member], parts: Sequence[AdapterExamples], batch_size: int
    ) -> None:
        rows = [(part, number) for part in parts for number in range(len(part.rows))]
        # Longest first; those of the same words lie side by side.
        rows.sort(key=lambda row: row[0].sort_key(row[1]), reverse=True)
        for first in range(0, len(rows), batch_size):
            self._run_rows(members, rows[first : first + batch_size])

    def _run_rows(
        self, members: dict[str, Member], rows: list[tuple[AdapterExamples, int]]
    ) -> None:
        """One pass over rows of several adapters, whose predictions go to their parts."""
        chosen: dict[AdapterExamples, list[int]] = {}
        for part, number in rows:
            chosen.setdefault(part, []).append(number)
        batches = [(part, numbers, part.batch(numbers)) for part, numbers in chosen.items()]
        inputs, owners = join_batches(batches)
        # What has the same tokens is one text.
        alike: dict[tuple, list[int]] = {}
        joined = torch.cat([tensor.long() for tensor in inputs.values()], dim=1).tolist()
        for number, row in enumerate(joined):
            alike.setdefault(tuple(row), []).append(number)
        texts = [numbers[0] for numbers in alike.values()]
        names = [[owners[number] for number in numbers] for numbers in alike.values()]
        given = {name: tensor[texts].to(self.device) for name, tensor in inputs.items()}
        found: list[Any] = [None] * len(owners)
        for numbers, results in zip(
            alike.values(), self._forward(members, given, names), strict=True
        ):
            for number, result in zip(numbers, results, strict=True):
                found[number] = result
        first = 0
        for part, numbers, batch in batches:
            count = batch.inputs["input_ids"].shape[0]
            part.take_rows(numbers, batch, found[first : first + count])
            first += count


def _typed_examples(name: str, run: BoundTask, texts: Sequence[str]) -> AdapterExamples:
    return AdapterExamples(name, run, run.featurize(run.task.from_texts(texts)))
