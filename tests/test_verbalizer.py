"""Label words at a mask: the sentences, the words, and the hooks of the language model's head."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.tasks import DataOptions, make_task
from ptv2_fast.tasks.features import TaskTokenizer
from ptv2_fast.tasks.verbalizer import MaskReader, find_word_ids, read_verbalizer
from ptv2_fast.training.baselines import trained_tensors
from ptv2_fast.training.methods import prepare_model
from ptv2_fast.training.models import load_run
from ptv2_fast.training.options import METHODS, ModelOptions, RunConfig
from ptv2_fast.training.prepare import prepare
from ptv2_fast.training.pretrained import load_tokenizer
from ptv2_fast.training.run import train
from ptv2_fast.training.scoring import run_model
from tests.models import (
    BACKBONES,
    MODEL_TYPES,
    assert_close_to_model,
    make_batch,
    one_thread,  # noqa: F401
    tiny_config,
)
from tests.tiny_run import save_tiny_model, write_reviews

MASK, WORDS = 59, [7, 30, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder without a language model's head, and in mlm/ the same with one."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder / "mlm")
    load_tokenizer(folder).save_pretrained(folder / "mlm")
    return folder


def cloze_task(**changes):
    values = {"task": "text-classification", "head": "lm", "verbalizer": "yes=good,no=bad"}
    return make_task(DataOptions(**{**values, **changes}))


def tokens_of(task, tokenizer, max_length=24, **texts) -> tuple[list[str], bool]:
    rows = {name: [text] for name, text in texts.items()}
    encoding, (cut,) = task.encode(rows, TaskTokenizer(tokenizer, max_length))
    return tokenizer.convert_ids_to_tokens(encoding["input_ids"][0]), cut


def test_the_sentence_around_the_mask(folder):
    """A hypothesis or a question comes first and loses its own full stop; "?" is unknown here."""
    tokenizer = load_tokenizer(folder)
    premise = {"text": "Anna lives in Oslo.", "text_pair": "Anna sleeps. "}
    pair = "[CLS] anna sleeps [UNK] [MASK] [SEP] anna lives in oslo . [SEP]".split()
    assert tokens_of(cloze_task(), tokenizer, **premise) == (pair, False)
    question = {"text_pair": "Anna lives in Oslo.", "text": "Anna sleeps"}
    boolq = cloze_task(task="boolq", verbalizer=None)
    assert tokens_of(boolq, tokenizer, **question) == (pair, False)
    single = "[CLS] it [UNK] [MASK] . the film was good [SEP]".split()
    assert tokens_of(cloze_task(), tokenizer, text="the film was good") == (single, False)


def test_truncation_never_cuts_the_mask(folder):
    tokenizer, long = load_tokenizer(folder), "anna lives in oslo and sleeps and works"
    single = "[CLS] it [UNK] [MASK] . anna lives [SEP]".split()
    assert tokens_of(cloze_task(), tokenizer, 8, text=long) == (single, True)
    other = "[CLS] bob sleeps [UNK] [MASK] [SEP] anna [SEP]".split()
    cut = tokens_of(cloze_task(), tokenizer, 8, text=long, text_pair="Bob sleeps")
    assert cut == (other, True)
    question = "[CLS] anna lives in [UNK] [MASK] [SEP] bob sleeps [SEP]".split()
    cut = tokens_of(cloze_task(), tokenizer, 10, text="Bob sleeps", text_pair=long)
    assert cut == (question, True)
    with pytest.raises(ValueError, match="max_length: expected room for a mask beside two texts"):
        tokens_of(cloze_task(), tokenizer, 4, text="Bob", text_pair="Anna")


def test_a_mask_in_the_text_is_refused(folder):
    with pytest.raises(ValueError, match=r"head: expected one \[MASK\] .* got 2 in 'It is"):
        tokens_of(cloze_task(), load_tokenizer(folder), text="the film was [MASK]")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "token-classification"}, "head: expected 'linear' for all but"),
        ({"regression": True}, "head: expected 'linear' for all but"),
        ({"head": "linear"}, "verbalizer: expected None without head='lm'"),
        ({"verbalizer": None}, "verbalizer: expected the word of each label"),
        ({"verbalizer": "yes"}, "verbalizer: expected labels and words, each once"),
        ({"verbalizer": "yes=good,no=good"}, "verbalizer: expected labels and words, each once"),
        ({"verbalizer": "yes=good,yes=bad"}, "verbalizer: expected labels and words, each once"),
    ],
)
def test_bad_options_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        cloze_task(**values)


def test_words_are_tokens_in_the_order_of_the_labels(folder):
    tokenizer = load_tokenizer(folder)
    words = read_verbalizer(" a=b = good, no=bad", None)
    assert words == {"a=b": "good", "no": "bad"}
    ids = find_word_ids(words, tokenizer, ["no", "a=b"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["bad", "good"]
    with pytest.raises(ValueError, match=r"words for the labels \['no', 'yes'\], got them for"):
        find_word_ids(words, tokenizer, ["no", "yes"])
    for word, pieces in (("bobs", r"\['bob', '##s'\]"), ("great", r"\['\[UNK\]'\]")):
        message = f"the word '{word}' of the label 'yes' to be one token .*got {pieces}"
        with pytest.raises(ValueError, match=message):
            find_word_ids({"yes": word, "no": "bad"}, tokenizer, ["no", "yes"])


MASKED = [
    name
    for name in MODEL_TYPES
    if transformers.CONFIG_MAPPING[name] in transformers.AutoModelForMaskedLM._model_mapping
]


def tiny_lm(model_type: str):
    torch.manual_seed(0)
    return transformers.AutoModelForMaskedLM.from_config(tiny_config(model_type)).eval()


def masked_batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch = make_batch()
    places = torch.tensor([10, 0, 2])
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == MASK, MASK - 1)
    ids[torch.arange(3), places] = MASK
    return batch | {"input_ids": ids}, places


@pytest.mark.parametrize("model_type", MASKED)
def test_logits_and_loss_are_those_of_the_plain_model_at_the_mask(model_type):
    """With a prefix, as frozen blocks and through hooks; its gradient too."""
    plain = tiny_lm(model_type)
    batch, places = masked_batch()
    labels = torch.tensor([2, 0, 1])
    for backbone in BACKBONES[model_type]:
        config = PTuningV2Config(num_virtual_tokens=5, backbone=backbone)
        model = copy.deepcopy(plain)
        MaskReader(model, MASK, WORDS)
        ptv2_fast.attach(model, config)
        nn.init.normal_(model.prefix_encoder.embedding.weight)
        table = model.prefix_encoder.embedding.weight.detach().clone()

        def expected(plain, table, config=config):
            whole = ptv2_fast.attach(copy.deepcopy(plain), config)
            whole.prefix_encoder.embedding.weight = nn.Parameter(table)
            logits = whole(**batch).logits[torch.arange(3), places]
            loss = nn.functional.cross_entropy(logits, torch.tensor(WORDS)[labels])
            (gradient,) = torch.autograd.grad(loss, whole.prefix_encoder.embedding.weight)
            return logits[:, WORDS], gradient, loss

        output = model(**batch, labels=labels)
        output.loss.backward()
        gradient = model.prefix_encoder.embedding.weight.grad
        actual = (output.logits.detach(), gradient)
        assert_close_to_model(actual, lambda *copies: expected(*copies)[:2], plain, table)
        torch.testing.assert_close(output.loss.detach(), expected(plain, table)[2].detach())


@pytest.mark.parametrize("model_type", MASKED)
def test_the_product_with_the_vocabulary_has_one_row_a_sequence(model_type):
    model = tiny_lm(model_type)
    MaskReader(model, MASK, WORDS)
    shapes = []
    model.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.logits.shape)), prepend=True
    )
    model(**masked_batch()[0])
    assert shapes == [(3, 1, 60)]


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_the_head_without_the_tied_vocabulary(method):
    model = tiny_lm("bert")
    prepare_model(model, ModelOptions(model="tiny", method=method, num_virtual_tokens=5))
    transform = ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    head = {"cls.predictions.bias", *(f"cls.predictions.transform.{name}" for name in transform)}
    assert {name for name in trained_tensors(model) if name.startswith("cls")} == head
    words = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is words
    assert words.requires_grad == (method == "fine-tuning")


RATES = {"p-tuning-v2": 0.03, "fine-tuning": 0.01, "linear-probe": 0.05, "prompt-tuning": 0.1,
         "p-tuning-v1": 0.01, "lora": 0.05}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_its_folder_scores_the_same(method, folder, tmp_path):
    config = RunConfig.from_dict({
        "task": "text-classification", "head": "lm", "verbalizer": "good=good,bad=bad",
        "model": str(folder / "mlm"), "method": method, "learning_rate": RATES[method],
        "train_file": write_reviews(tmp_path / "train.csv", 24),
        "validation_file": write_reviews(tmp_path / "dev.csv", 8), "num_virtual_tokens": 4,
        "num_train_epochs": 16, "eval_steps": 24, "batch_size": 4, "dropout": 0.0,
        "head_learning_rate": 0.01, "progress": False,
    })  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model: .* has no pretrained head")
        prepared = prepare(config, tmp_path / "run")
    report = train(prepared)
    assert report["metrics"]["validation"]["accuracy"] > 0.8
    loaded = load_run(tmp_path / "run")
    validation = prepared.part.features["validation"]
    again = run_model(loaded, validation).results
    trained = run_model(prepared.part, validation).results
    assert again == trained, "to the last bit"


def test_a_new_head_is_warned_of(folder, tmp_path):
    config = RunConfig.from_dict({
        "task": "text-classification", "head": "lm", "verbalizer": "good=good,bad=bad",
        "model": str(folder), "train_file": write_reviews(tmp_path / "train.csv", 4),
    })  # fmt: skip
    with pytest.warns(UserWarning, match="has no pretrained head for AutoModelForMaskedLM"):
        prepare(config, tmp_path / "run")
