"""Training data: files to documents to batches."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ttt.errors import TrainingDataError
from mlx_ttt.loading import bundled_model
from mlx_ttt.text.tokenizer import encode, load_tokenizer
from mlx_ttt.training import data
from mlx_ttt.training.data import Batches, Document, hold_out, read_documents, read_texts

BOS, EOS = 1, 2
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled_model(), {"eos_token_id": EOS})


@pytest.fixture
def chat_tokenizer():
    tokenizer = load_tokenizer(bundled_model(), {"eos_token_id": EOS})
    tokenizer._tokenizer.chat_template = CHATML
    return tokenizer


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def counted(document, tokenizer) -> str:
    """The text of the tokens that are to be predicted."""
    return tokenizer.decode([int(i) for i, counts in zip(document.ids[1:], document.predicted, strict=True) if counts])


class TestText:
    def test_file_is_one_document(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("To be,\n\nor not to be")
        (document,) = read_documents([tmp_path / "a.txt"], tokenizer)
        assert document.ids.dtype == np.int32
        assert document.ids.tolist() == [*tokenizer.encode("To be,\n\nor not to be"), EOS]
        assert document.ids[0] == BOS
        assert document.predicted.all()

    def test_line_ends_and_byte_order_mark(self, tmp_path, tokenizer):
        (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfTo be,\r\nor not\r\n")
        (document,) = read_documents([tmp_path / "windows.txt"], tokenizer)
        assert document.ids.tolist() == [*tokenizer.encode("To be,\nor not\n"), EOS]

    def test_folder_sorted_and_recursive(self, tmp_path, tokenizer):
        for name in ("b.txt", "a/z.md", "a/y/x", ".hidden", ".git/config", "c.jsonl"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("l") else name)
        (tmp_path / "a/loop").symlink_to(tmp_path)
        documents = read_documents([tmp_path], tokenizer)
        assert [tokenizer.decode(d.ids[1:-1].tolist()) for d in documents] == ["a/y/x", "a/z.md", "b.txt", "c.jsonl"]

    @pytest.mark.parametrize("unit", ["But soft, what light\n", "word ", "x", "\n", " \n ", "é🙂"])
    def test_pieces_give_the_ids_of_the_whole(self, tmp_path, tokenizer, monkeypatch, unit):
        text = unit * (3000 // len(unit)) + "end"
        (tmp_path / "a.txt").write_text(text)
        monkeypatch.setattr(data, "PIECE", 500)
        (document,) = read_documents([tmp_path / "a.txt"], tokenizer)
        monkeypatch.undo()
        if unit in ("x", "\n", " \n "):  # without any boundary, pieces are cut anywhere
            assert tokenizer.decode(document.ids[1:-1].tolist()) == text
        elif unit != "é🙂":
            assert document.ids.tolist() == [*tokenizer.encode(text), EOS]
        assert tokenizer.decode(document.ids[1:-1].tolist()) == text

    def test_tokenizer_is_called_with_pieces(self, tmp_path, tokenizer, monkeypatch):
        (tmp_path / "a.txt").write_text("But soft, what light\n" * 1000)
        monkeypatch.setattr(data, "PIECE", 1000)
        lengths = []
        monkeypatch.setattr(data, "encode", lambda t, text, c: lengths.append(len(text)) or encode(t, text, c))
        read_documents([tmp_path / "a.txt"], tokenizer)
        assert len(lengths) >= 20
        assert max(lengths) <= 2000

    def test_not_utf8(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_bytes(b"one\ntwo\nna\xefve\n")
        with pytest.raises(TrainingDataError, match=r"a\.txt, line 3: not UTF-8"):
            read_documents([tmp_path], tokenizer)

    def test_not_utf8_behind_a_block(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(data, "PIECE", 7)
        (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n" * 10 + b"na\xefve")
        with pytest.raises(TrainingDataError, match=r"a\.txt, line 21: not UTF-8"):
            read_documents([tmp_path], tokenizer)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "a.txt: the text is empty"), (b" \n\n", "the text is empty"), (b"a\0b", "not a text file")],
    )
    def test_empty_and_binary(self, tmp_path, tokenizer, content, message):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(TrainingDataError, match=message):
            read_documents([tmp_path / "a.txt"], tokenizer)

    def test_missing(self, tmp_path, tokenizer):
        with pytest.raises(TrainingDataError, match=r"nothing: No such file"):
            read_documents([tmp_path / "nothing"], tokenizer)
        with pytest.raises(TrainingDataError, match="no files in this folder"):
            read_documents([tmp_path], tokenizer)
        with pytest.raises(TrainingDataError, match="no training data"):
            read_documents([], tokenizer)

    def test_vocabulary(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("To be")
        read_documents([tmp_path / "a.txt"], tokenizer, vocab_size=5000)
        with pytest.raises(TrainingDataError, match=r"a\.txt: .* outside the model's vocabulary of 40"):
            read_documents([tmp_path / "a.txt"], tokenizer, vocab_size=40)


class TestRecords:
    def test_text(self, tmp_path, tokenizer):
        file = write_lines(tmp_path / "a.jsonl", {"text": "one"}, "\n", {"text": "two\n"})
        documents = read_documents([file], tokenizer)
        assert [d.ids.tolist() for d in documents] == [
            [*tokenizer.encode("one"), EOS],
            [*tokenizer.encode("two\n"), EOS],
        ]

    def test_completion(self, tmp_path, tokenizer):
        file = write_lines(tmp_path / "a.jsonl", {"prompt": "To be,", "completion": " or not"})
        (document,) = read_documents([file], tokenizer)
        prompt = tokenizer.encode("To be,")
        assert document.ids.tolist() == [*prompt, *encode(tokenizer, " or not", True), EOS]
        assert document.counts.tolist() == [i >= len(prompt) for i in range(len(document.ids))]
        (document,) = read_documents([file], tokenizer, all_tokens=True)
        assert document.predicted.all()

    def test_completion_with_chat_template(self, tmp_path, chat_tokenizer):
        file = write_lines(tmp_path / "a.jsonl", {"prompt": "To be?", "completion": "Not."})
        (document,) = read_documents([file], chat_tokenizer)
        assert counted(document, chat_tokenizer) == "Not.</s>\n"

    def test_messages(self, tmp_path, chat_tokenizer):
        turns = [("system", "s"), ("user", "To be?"), ("assistant", "Not."), ("user", "Or"), ("assistant", "be,\n be")]
        messages = [{"role": role, "content": content} for role, content in turns]
        file = write_lines(tmp_path / "a.jsonl", {"messages": messages})
        (document,) = read_documents([file], chat_tokenizer)
        whole = chat_tokenizer.apply_chat_template(messages, tokenize=False)
        assert chat_tokenizer.decode(document.ids.tolist()) == whole
        assert counted(document, chat_tokenizer) == "Not.</s>\nbe,\n be</s>\n"
        (document,) = read_documents([file], chat_tokenizer, all_tokens=True)
        assert document.predicted.all()
        assert chat_tokenizer.decode(document.ids.tolist()) == whole

    def test_template_that_rewrites_turns(self, tmp_path, chat_tokenizer):
        last = CHATML.replace("m['content']", "(m['content'] if loop.last else '…')")
        chat_tokenizer._tokenizer.chat_template = last
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        file = write_lines(tmp_path / "a.jsonl", {"messages": turn * 2})
        with pytest.raises(TrainingDataError, match=r"line 1: .*--all-tokens"):
            read_documents([file], chat_tokenizer)
        read_documents([file], chat_tokenizer, all_tokens=True)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": \n', "not JSON"),
            ("[1]\n", "not a JSON object"),
            ({"txt": "a"}, 'it has no "text"'),
            ({"text": 3}, '"text" is not a string'),
            ({"text": " "}, "the text is empty"),
            ({"prompt": "a"}, '"completion" is missing'),
            ({"completion": "a"}, '"prompt" is missing'),
            ({"prompt": "a", "completion": ""}, '"completion" is empty'),
            ({"messages": []}, '"messages" is not a list of objects'),
            ({"messages": "hello"}, '"messages" is not a list of objects'),
            ({"messages": [{"content": "a"}]}, 'message 1 has no "role"'),
            ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
            ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role assistant"),
        ],
    )
    def test_bad_line(self, tmp_path, chat_tokenizer, line, message):
        good = {"messages": [{"role": "assistant", "content": "hello"}]}
        file = write_lines(tmp_path / "a.jsonl", good, "\n", line)
        with pytest.raises(TrainingDataError) as error:
            read_documents([file], chat_tokenizer)
        assert f"{file}, line 3: " in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_bad_template_and_none(self, tmp_path, tokenizer, chat_tokenizer):
        file = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": "hello"}]})
        with pytest.raises(TrainingDataError, match=r"line 1: .* chat template, and this one has none"):
            read_documents([file], tokenizer)
        chat_tokenizer._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(TrainingDataError, match=r"line 1: the chat template refuses it: .*alternate"):
            read_documents([file], chat_tokenizer)

    def test_empty_and_not_utf8(self, tmp_path, tokenizer):
        (tmp_path / "a.jsonl").write_bytes(b"\n")
        with pytest.raises(TrainingDataError, match="there is no data in it"):
            read_documents([tmp_path / "a.jsonl"], tokenizer)
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
        with pytest.raises(TrainingDataError, match="line 2: not UTF-8"):
            read_documents([tmp_path / "a.jsonl"], tokenizer)

    def test_texts(self, tmp_path):
        write_lines(
            tmp_path / "a.jsonl",
            {"text": "one"},
            {"prompt": "two", "completion": "three"},
            {"messages": [{"role": "user", "content": "four"}]},
        )
        (tmp_path / "b.txt").write_text("five")
        assert list(read_texts([tmp_path])) == ["one", "two", "three", "four", "five"]


class TestDataSets:
    """With a stand-in for `datasets`, and with itself where it is installed."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "set").mkdir()
        for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
            (tmp_path / "set" / name).write_text("{}")
        return tmp_path / "set"

    @pytest.fixture
    def stand_in(self, monkeypatch):
        module = ModuleType("datasets")
        module.DatasetDict = type("DatasetDict", (dict,), {})
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    def test_not_installed(self, folder, tokenizer, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(TrainingDataError, match=r"set: a Hugging Face data set; .*pip install datasets"):
            read_documents([folder.parent], tokenizer)

    def test_rows(self, folder, tokenizer, stand_in):
        rows = [{"text": "one"}, {"text": ""}, {"text": "two", "label": None}]
        stand_in.load_from_disk = lambda path: rows
        assert len(read_documents([folder], tokenizer)) == 2
        rows.append({"label": 1})
        with pytest.raises(TrainingDataError, match='set, row 4: it has no "text"'):
            read_documents([folder], tokenizer)

    def test_splits(self, folder, tokenizer, stand_in):
        splits = stand_in.DatasetDict(train=[{"text": "one"}], test=[{"text": "two"}, {"text": "three"}])
        stand_in.load_from_disk = lambda path: splits
        assert len(read_documents([folder], tokenizer)) == 1
        del splits["train"]
        assert len(read_documents([folder], tokenizer)) == 2
        splits["valid"] = []
        with pytest.raises(TrainingDataError, match="no split named train; name the folder of one of test, valid"):
            read_documents([folder], tokenizer)

    def test_damaged(self, folder, tokenizer, stand_in):
        def load(path):
            raise ValueError("arrow\nis bent")

        stand_in.load_from_disk = load
        with pytest.raises(TrainingDataError, match="set: the data set cannot be read: "):
            read_documents([folder], tokenizer)

    def test_itself(self, tmp_path, tokenizer):
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
        rows.save_to_disk(str(tmp_path / "rows"))
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "splits"))
        assert len(read_documents([tmp_path], tokenizer)) == 4


# ---------------------------------------------------------------------------------------------- batches


@st.composite
def corpora(draw) -> list[Document]:
    """Documents whose tokens are all different, so that it can be seen which are predicted."""
    documents, token = [], 1
    for n in draw(st.lists(st.integers(2, 40), min_size=1, max_size=12)):
        counts = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) if draw(st.booleans()) else None
        documents.append(Document(np.arange(token, token + n, dtype=np.int32), counts))
        token += n
    if not any(d.predicted.any() for d in documents):
        documents.append(Document(np.arange(token, token + 2, dtype=np.int32)))
    return documents


def expected_tokens(documents) -> list[int]:
    return sorted(int(i) for d in documents for i in d.ids[1:][d.predicted])


SHAPES = {"length": st.integers(1, 20), "batch_size": st.integers(1, 5), "seed": st.integers(0, 9)}


class TestBatches:
    @settings(deadline=None)
    @given(documents=corpora(), carry=st.booleans(), epoch=st.integers(0, 3), **SHAPES)
    def test_every_token_once_an_epoch(self, documents, carry, epoch, length, batch_size, seed):
        batches = Batches(documents, length, batch_size, seed, carry)
        predicted = []
        for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
            batch = batches.batch(step)
            B, T = batch.weights.shape
            assert batch_size == B and 1 <= T <= length
            assert batch.ids.shape == (B, T + 1) and batch.ids.dtype == np.int32
            assert batch.weights.dtype == np.float32 and batch.fresh.dtype == bool and batch.fresh.shape == (B,)
            assert set(np.unique(batch.weights)) <= {0, 1}
            here = batch.weights == 1
            assert carry or here.any()
            predicted += batch.ids[:, 1:][here].tolist()
            # The token before each predicted one is the one before it in its document.
            assert (batch.ids[:, :-1][here] + 1 == batch.ids[:, 1:][here]).all()
        assert sorted(predicted) == expected_tokens(documents)

    @pytest.mark.slow
    @settings(deadline=None)
    @given(documents=corpora(), **SHAPES)
    def test_rows_go_on(self, documents, length, batch_size, seed):
        """With carry, a row reads each document from its first token to its last predicted one, window by window."""
        batches = Batches(documents, length, batch_size, seed, carry=True)
        first = {int(d.ids[0]) for d in documents}
        for row in range(batch_size):
            last = None  # the last token that was predicted, in a whole window
            for step in range(3 * len(batches)):
                batch = batches.batch(step)
                ids, fresh = batch.ids[row], batch.fresh[row]
                if fresh:
                    assert int(ids[0]) in first or not ids.any()
                else:
                    assert ids[0] == last
                last = ids[-1] if len(ids) == length + 1 and ids.all() else None

    @settings(deadline=None)
    @given(documents=corpora(), **SHAPES)
    def test_documents_are_cut_only_into_whole_windows(self, documents, length, batch_size, seed):
        batches = Batches(documents, length, batch_size, seed)
        begins = {int(d.ids[0]) + i for d in documents for i in range(0, len(d.ids), length)}
        for step in range(len(batches)):
            batch = batches.batch(step)
            assert batch.fresh.all()
            assert all(row[0] in begins or not row.any() for row in batch.ids)

    @settings(deadline=None, max_examples=30)
    @given(documents=corpora(), carry=st.booleans(), steps=st.lists(st.integers(0, 60), max_size=8), **SHAPES)
    def test_a_pure_function_of_the_step(self, documents, carry, steps, length, batch_size, seed):
        batches = Batches(documents, length, batch_size, seed, carry)
        for step in steps:
            other = Batches(documents, length, batch_size, seed, carry).batch(step)
            batch = batches.batch(step)
            for name in ("ids", "weights", "fresh"):
                assert np.array_equal(getattr(batch, name), getattr(other, name))

    @pytest.mark.parametrize("carry", [False, True])
    def test_epochs_and_seeds_differ(self, carry):
        documents = [Document(np.arange(100 * i + 1, 100 * i + 30, dtype=np.int32)) for i in range(20)]

        def order(seed, epoch):
            batches = Batches(documents, 28, 1, seed, carry)
            return [int(batches.batch(epoch * 20 + i).ids[0, 0]) for i in range(20)]

        assert sorted(order(0, 0)) == sorted(order(0, 1)) == sorted(order(1, 0))
        assert len({tuple(order(*at)) for at in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4

    def test_short_text_is_padded(self):
        batch = Batches([Document(np.array([1, 5, 6, 2], np.int32))], 2048, 2).batch(0)
        assert sorted(batch.ids.tolist()) == [[0, 0, 0, 0], [1, 5, 6, 2]]
        assert sorted(batch.weights.tolist()) == [[0, 0, 0], [1, 1, 1]]

    def test_little_padding(self):
        """Windows of one batch are about equally long, and rows end at about the same time."""
        lengths = np.random.default_rng(0).integers(2, 500, 400)
        documents = [Document(np.ones(n, np.int32)) for n in lengths]
        batches = Batches(documents, 500, 4)
        assert sum(batches.batch(i).weights.size for i in range(len(batches))) < 1.1 * (lengths - 1).sum()
        batches = Batches(documents, 100, 4, carry=True)
        windows = sum(-(-(n - 1) // 100) for n in lengths)
        assert len(batches) <= -(-windows // 4) + 1

    def test_long_prompt_is_read_only_with_carry(self):
        document = Document(np.arange(1, 32, dtype=np.int32), np.arange(31) >= 25)
        assert Batches([document], 10, 1).batch(0).ids[0, 0] == 21
        batches = Batches([document], 10, 1, carry=True)
        assert [batches.batch(i).weights.sum() for i in range(len(batches))] == [0, 0, 6]

    def test_nothing_to_predict(self):
        with pytest.raises(TrainingDataError, match="no token to predict"):
            Batches([Document(np.array([3], np.int32))], 8, 1)

    def test_fingerprint(self):
        documents = [Document(np.array([1, 2, 3], np.int32))]
        counts = [Document(np.array([1, 2, 3], np.int32), np.array([False, True, True]))]
        same = Batches(documents, 8, 1).fingerprint
        assert Batches(documents, 8, 1).fingerprint == same
        others = [Batches(counts, 8, 1), Batches(documents, 9, 1), Batches(documents, 8, 1, 1)]
        assert same not in {batches.fingerprint for batches in others}


class TestHoldOut:
    @settings(deadline=None)
    @given(
        sizes=st.lists(st.integers(2, 60), min_size=1, max_size=30),
        fraction=st.floats(0.05, 0.5),
        seed=st.integers(0, 5),
    )
    def test_every_token_is_on_one_side(self, sizes, fraction, seed):
        ends = np.cumsum(sizes)
        documents = [Document(np.arange(b - n, b, dtype=np.int32)) for n, b in zip(sizes, ends, strict=True)]
        try:
            train, test = hold_out(documents, fraction, seed)
        except TrainingDataError:
            assert fraction * sum(sizes) < 4 or (1 - fraction) * sum(sizes) < 4
            return
        assert sorted(np.concatenate([d.ids for d in train + test])) == list(range(sum(sizes)))
        assert sum(len(d.ids) for d in test) <= round(fraction * sum(sizes))

    def test_whole_documents_where_possible(self):
        documents = [Document(np.ones(10, np.int32)) for _ in range(100)]
        train, test = hold_out(documents, 0.1)
        assert (len(train), len(test)) == (90, 10)

    def test_end_of_a_single_document(self):
        counts = np.arange(1000) % 2 == 0
        (train,), (test,) = hold_out([Document(np.arange(1000, dtype=np.int32), counts)], 0.05)
        assert train.ids.tolist() == list(range(950))
        assert test.ids.tolist() == list(range(950, 1000))
        assert test.counts.tolist() == counts[950:].tolist()

    def test_too_little(self):
        with pytest.raises(TrainingDataError, match="too little data"):
            hold_out([Document(np.array([1, 2, 3], np.int32))], 0.05)
