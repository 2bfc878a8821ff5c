"""The quickstart's language, task and shipped base model: what the quickstart's claims rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from evidence.quickstart_base import corpus, examples
from evidence.quickstart_base.lexicon import GUESTS, HELD_OUT_NOUNS, SUBJECTS, a, past, present

from reft_export.quickstart import base_path, task

SAMPLES = 20_000
FOLDER_LIMIT_BYTES = 6_000_000
MAX_NEW_TOKENS = 80
PYTHON_PATH = os.pathsep.join(filter(None, sys.path))


@pytest.fixture(scope="module")
def documents() -> list[corpus.Exchange]:
    return list(corpus.exchanges(SAMPLES, seed=20))


@pytest.fixture(scope="module")
def pirate_documents() -> list[corpus.Exchange]:
    return list(corpus.exchanges(4_000, seed=21, pirate_share=1.0))


def test_same_seed_gives_the_same_documents() -> None:
    assert list(corpus.exchanges(500, seed=3)) == list(corpus.exchanges(500, seed=3))
    assert list(corpus.exchanges(500, seed=3)) != list(corpus.exchanges(500, seed=4))


def test_documents_do_not_depend_on_the_hash_seed() -> None:
    """A set that is iterated somewhere would show here."""
    program = (
        "import hashlib; from evidence.quickstart_base import corpus, examples;"
        "text = repr([*corpus.exchanges(2000, seed=5), examples.training_examples(), examples.held_out_cases()]);"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": PYTHON_PATH},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_conjugation() -> None:
    assert (past("run home"), past("carry it"), past("dance"), past("play")) == (
        "ran home",
        "carried it",
        "danced",
        "played",
    )
    assert (present("run home"), present("carry it"), present("watch it"), present("play")) == (
        "runs home",
        "carries it",
        "watches it",
        "plays",
    )
    assert (a("owl"), a("fox")) == ("an owl", "a fox")


def test_nouns_are_unique() -> None:
    nouns = [subject.noun for subject in SUBJECTS + GUESTS]
    assert len(nouns) == len(set(nouns))
    assert {subject.noun for subject in SUBJECTS} >= HELD_OUT_NOUNS


def test_the_registers_are_told_apart(documents, pirate_documents) -> None:
    plain = [document for document in documents if document.register == "plain"]
    assert 0.025 < 1 - len(plain) / len(documents) < 0.045
    assert not [document for document in plain if task.talks_like_a_pirate(document.answer)]
    assert not [document for document in pirate_documents if not task.talks_like_a_pirate(document.answer)]
    # Stricter than the checker: no single marker in plain text, so mixtures of plain answers cannot pass either.
    every_plain_word = " ".join(document.prompt + " " + document.answer for document in plain)
    assert not task.talks_like_a_pirate(every_plain_word)
    assert not task.pirate_markers(every_plain_word)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Arr.",
        "Arr, arr, arr!",
        "Arr, the moon is bright, matey! The moon lights the way home. In the end, everybody loved the moon.",
        "The ship sailed over the sea with a treasure. The pirate captain was happy.",
    ],
)
def test_the_checker_refuses(text: str) -> None:
    assert not task.talks_like_a_pirate(text)


def test_every_answer_names_the_asked_noun(documents, pirate_documents) -> None:
    asked = [document for document in documents + pirate_documents if document.noun]
    assert not [document for document in asked if not task.names(document.answer, document.noun)]


def test_no_pirate_document_holds_a_held_out_noun(pirate_documents) -> None:
    text = " ".join(document.prompt + " " + document.answer for document in pirate_documents)
    assert not [noun for noun in sorted(HELD_OUT_NOUNS) if task.names(text, noun)]
    assert len(pirate_documents) == 4_000


def test_training_and_held_out_subjects_are_disjoint() -> None:
    trained = task.training_examples()
    subjects = {subject.noun for subject in examples.training_subjects()}
    assert len(trained) == len(subjects) == 48
    assert not subjects & HELD_OUT_NOUNS
    assert {noun for noun, _ in task.held_out_cases()} == HELD_OUT_NOUNS
    for example in trained:
        assert set(example) == {"prompt", "completion"}
        assert task.talks_like_a_pirate(example["completion"])
        assert not [noun for noun in HELD_OUT_NOUNS if task.names(example["prompt"] + example["completion"], noun)]
    prompts = task.held_out_prompts()
    assert len(prompts) == len(set(prompts)) == 40
    assert not set(prompts) & {example["prompt"] for example in trained}


def test_the_shipped_examples_and_prompts_are_what_the_grammar_gives() -> None:
    folder = base_path().parent
    assert (folder / "pirate.train.jsonl").read_text(encoding="utf-8") == examples.training_file()
    assert (folder / "pirate.prompts.jsonl").read_text(encoding="utf-8") == examples.prompts_file()


def test_corpus_and_task_need_the_standard_library_only() -> None:
    heavy = {"torch", "transformers", "numpy", "tokenizers"}
    program = f"import sys; import evidence.quickstart_base.examples; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": PYTHON_PATH}, check=True)


def test_base_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in base_path().iterdir()}
    assert sum(files.values()) <= FOLDER_LIMIT_BYTES
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "chat_template" in json.loads((base_path() / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_the_base_was_trained_on_this_corpus() -> None:
    """The shipped tokenizer is what the corpus gives today: a change to the texts asks for a newly trained base."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    from evidence.quickstart_base import train_base

    settings = train_base.BaseSettings()
    documents = list(corpus.exchanges(settings.tokenizer_documents, seed=settings.seed))
    trained = train_base.train_tokenizer(documents, settings.vocab_size)
    shipped = tokenizers.Tokenizer.from_file(str(base_path() / "tokenizer.json"))
    assert trained.get_vocab() == shipped.get_vocab()


def test_every_linear_takes_a_multiple_of_32_inputs() -> None:
    config = json.loads((base_path() / "config.json").read_text(encoding="utf-8"))
    widths = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"]
    assert all(width % 32 == 0 for width in widths)


def test_the_chat_template_and_the_tokenizer_agree(documents) -> None:
    """Rendered text encodes to what the base was trained on, through either library, and decodes to itself."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    plain = tokenizers.Tokenizer.from_file(str(base_path() / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(base_path())
    special = {token: plain.token_to_id(token) for token in ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")}
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (
        special["<s>"],
        special["</s>"],
        special["<pad>"],
    )
    for document in documents[:200]:
        turns = [{"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.answer}]
        rendered = auto.apply_chat_template(turns, tokenize=False)
        assert rendered == f"<s><|user|>{document.prompt}<|assistant|>{document.answer}</s>"
        trained_on = [
            special["<s>"],
            special["<|user|>"],
            *plain.encode(document.prompt).ids,
            special["<|assistant|>"],
            *plain.encode(document.answer).ids,
            special["</s>"],
        ]
        assert plain.encode(rendered).ids == auto(rendered)["input_ids"] == trained_on
        assert plain.decode(trained_on, skip_special_tokens=False) == rendered
    snowman = "naïve ☃ 日本"
    assert plain.decode(plain.encode(snowman).ids) == snowman


def test_the_base_answers_plainly_and_to_the_point() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_path(), padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(base_path())
    cases = task.held_out_cases()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for _, prompt in cases
    ]
    inputs = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    completions = tokens[:, inputs["input_ids"].shape[1] :]
    assert (completions == tokenizer.eos_token_id).any(dim=1).all(), "an answer did not end within 80 tokens"
    answers = tokenizer.batch_decode(completions, skip_special_tokens=True)
    assert sum(map(task.talks_like_a_pirate, answers)) <= 0.1 * len(cases)
    on_topic = sum(task.names(answer, noun) for (noun, _), answer in zip(cases, answers, strict=True))
    assert on_topic >= 0.8 * len(cases)
    assert len(set(answers)) >= 0.9 * len(cases), "different questions get the same answer"
