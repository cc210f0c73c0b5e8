"""Examples to fine-tune on and to score: rows of a JSON-lines or CSV file, or small sets made up here.

Columns, by task; in CSV a list is written with spaces between its members.

    classify   text, label                 and text_b where two texts are judged together
    tokens     tokens, tags                lists of the same length; tags O, B-kind, I-kind, or any labels
    qa         question, context, answer   answer_start (characters) if the answer occurs before; "" has no answer;
                                           or answers = {text: [...], answer_start: [...]}, as in SQuAD
    instruct   prompt, answer              or messages = [{role: system | user | assistant, content: ...}, ...]
"""

import csv
import itertools
import json
import pathlib
import random
import zlib

from fastattn.recipes.data import DataError

COLUMNS = {
    "classify": (("text", "label"),),
    "tokens": (("tokens", "tags"),),
    "qa": (("question", "context", "answer"), ("question", "context", "answers")),
    "instruct": (("prompt", "answer"), ("messages",)),
}


def read(path, task):
    """[{column: value}] of a .jsonl or .csv file, checked and in one form whichever columns it had."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    readers = {".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines}
    if path.suffix not in readers:
        raise DataError(f"{path}: need .jsonl or .csv, with {_columns(task)}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [(line, _checked(row, task, path, line)) for line, row in readers[path.suffix](file, path)]
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text (byte {e.start})") from e
    if not rows:
        raise DataError(f"{path}: holds no examples; need {_columns(task)}")
    return [row for _, row in rows]


def _json_lines(file, path):
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError as e:
                raise DataError(f"{path}, line {line}: is not JSON ({e})") from e
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {line}: holds a {type(row).__name__}, needs an object")
            yield line, row


def _csv(file, path):
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None and v is not None}
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: is not CSV ({e})") from e


def _columns(task):
    return " or ".join("columns " + ", ".join(names) for names in COLUMNS[task])


def _checked(row, task, path, line):
    where = f"{path}, line {line}"
    if not any(all(name in row for name in names) for names in COLUMNS[task]):
        raise DataError(f"{where}: has {', '.join(row) or 'nothing'}; need {_columns(task)}")
    try:
        return FORMS[task](row)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
        raise DataError(f"{where}: {e}") from e


def _text(row, name):
    if not isinstance(row[name], str):
        raise ValueError(f"{name} is a {type(row[name]).__name__}, needs text")
    return row[name]


def _list(row, name):
    value = row[name].split() if isinstance(row[name], str) else row[name]
    if not (isinstance(value, list) and all(isinstance(v, (str, int)) for v in value)):
        raise ValueError(f"{name} is {value!r}, needs a list")
    return [str(v) for v in value]


def _classify(row):
    pair = {"text_b": _text(row, "text_b")} if row.get("text_b") is not None else {}
    if not isinstance(row["label"], (str, int)):
        raise ValueError(f"label is {row['label']!r}, needs text or a number")
    return {"text": _text(row, "text"), **pair, "label": str(row["label"])}


def _tokens(row):
    tokens, tags = _list(row, "tokens"), _list(row, "tags")
    if len(tokens) != len(tags) or not tokens:
        raise ValueError(f"{len(tokens)} tokens and {len(tags)} tags, needs as many, and one at least")
    return {"tokens": tokens, "tags": tags}


def _qa(row):
    context = _text(row, "context")
    if "answers" in row:
        answers, starts = row["answers"]["text"], row["answers"]["answer_start"]
    else:
        answers = [_text(row, "answer")] if row["answer"] else []
        start = row.get("answer_start")
        starts = [int(start) if start not in (None, "") else context.find(a) for a in answers]
    for answer, start in zip(answers, starts, strict=True):
        if start < 0 or context[start : start + len(answer)] != answer:
            raise ValueError(f"the answer {answer!r} is not in the context at {start}")
    return {
        "question": _text(row, "question"),
        "context": context,
        "answers": {"text": list(answers), "answer_start": list(starts)},
    }


def _instruct(row):
    if "messages" not in row:
        prompt, answer = _text(row, "prompt"), _text(row, "answer")
        said = [("user", prompt), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in said]}
    messages = [{"role": m["role"], "content": _text(m, "content")} for m in row["messages"]]
    for m in messages:
        if m["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"role {m['role']!r}, needs system, user or assistant")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no message of the assistant, so there is nothing to learn")
    return {"messages": messages}


FORMS = {"classify": _classify, "tokens": _tokens, "qa": _qa, "instruct": _instruct}


def text(row):
    """All the text of a row, to learn a tokenizer from."""
    if "messages" in row:
        return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in row["messages"])
    words = " ".join(row["tokens"]) if "tokens" in row else None
    parts = [words, *(row.get(name) for name in ("text", "text_b", "question", "context"))]
    return "\n".join(part for part in parts if part)


def made(task, n, seed=0, held_out=False):
    """n examples that are made up from lists of words: no file, no network, the same every time.

    One in five possible examples is held out: it never is among those to train on. Of instruct, one wording in three of
    every question.
    """
    draw, found = random.Random(f"{task} {seed}"), []
    while len(found) < n:
        row = FORMS[task](MAKERS[task](draw))
        if held_out == (_held_out(row) if task != "instruct" else _held_out_questions(row)):
            found.append(row)
    return found


def _held_out(row):
    return zlib.crc32(json.dumps(row, sort_keys=True).encode()) % 5 == 0


def _held_out_questions(row):
    """Whether all questions are; None where some are."""
    sides = {m["content"] in NEVER_ASKED for m in row["messages"] if m["role"] == "user"}
    return sides.pop() if len(sides) == 1 else None


FIRST = "Anna Jonas Mira Otto Paris Sofia Florence Emil Austin Clara Victoria Hugo Sydney Georgia".split()
LAST = "Berg Lund Marsh Stone Weber Rossi Novak Lincoln Washington Jackson Hill".split()
PLACES = (
    "Paris Rome Florence Oslo Austin Vienna Victoria Lincoln Sydney Lima Georgia Jackson Washington".split()
)
MONTHS = "January February March April May June July August".split()
THINGS = "film book song meal hotel phone garden play room show".split()
GOOD = "good great lovely wonderful charming excellent".split()
BAD = "bad awful boring terrible dull poor".split()


def _made_classify(draw):
    """Reviews: 'not' turns a word's meaning round, so that counting good and bad words does not do."""
    label = draw.choice(["positive", "negative"])
    negated = draw.random() < 0.3
    words = GOOD if (label == "positive") != negated else BAD
    thing, word = draw.choice(THINGS), draw.choice(words)
    verb = draw.choice(["was", "is", "seemed"])
    said = f"{verb} not {word}" if negated else f"{verb} {draw.choice(['', 'very ', 'so '])}{word}"
    return {"text": f"{draw.choice(['The', 'This', 'Our'])} {thing} {said}.", "label": label}


def _made_tokens(draw):
    """People and places that share their words: Paris Hill flew to Florence, Florence Washington to Paris."""
    person = [(draw.choice(FIRST), "B-PER"), (draw.choice(LAST), "I-PER")]
    place, other = [(draw.choice(PLACES), "B-LOC")], [(draw.choice(PLACES), "B-LOC")]
    if draw.random() < 0.3:
        place = [("New", "B-LOC"), (place[0][0], "I-LOC")]
    person = person[draw.random() < 0.3 :] if draw.random() < 0.5 else person
    person[0] = (person[0][0], "B-PER")
    parts = draw.choice(
        [
            [person, "flew from", place, "to", other],
            ["In", place, ",", person, "met a friend from", other],
            [person, "lives in", place],
            ["Last week", person, "wrote about", place, "and", other],
        ]
    )
    pieces = [[(w, "O") for w in part.split()] if isinstance(part, str) else part for part in parts]
    tokens, tags = zip(*itertools.chain(*pieces, [(".", "O")]), strict=True)
    return {"tokens": list(tokens), "tags": list(tags)}


def _made_qa(draw):
    """A fact of who met whom, where and when, told in several ways; the question asks for one of the four."""
    who, whom = draw.sample(FIRST, 2)
    who, whom = f"{who} {draw.choice(LAST)}", f"{whom} {draw.choice(LAST)}"
    place, month = draw.choice(PLACES), draw.choice(MONTHS)
    fact = draw.choice(
        [
            f"In {month} {who} met {whom} in {place}.",
            f"{who} met {whom} in {place} in {month}.",
            f"It was in {place} that {who} met {whom} in {month}.",
        ]
    )
    said = [f"The {t} was {draw.choice(GOOD + BAD)}." for t in draw.sample(THINGS, 2)]
    said.insert(draw.randrange(3), fact)
    context = " ".join(said)
    asked = {"Where did they meet?": place, "When did they meet?": month}
    asked |= {"Who met someone?": who, "Who was met?": whom}
    question, answer = draw.choice(list(asked.items()))
    before = context.index(fact)  # a name may be a word of another name: Paris Hill in Paris
    offset = {
        place: fact.rindex(f"in {place}") + 3,
        month: fact.rindex(f"n {month}") + 2,
        who: fact.index(f"{who} met"),
        whom: fact.index(f"met {whom}") + 4,
    }
    return {
        "question": question,
        "context": context,
        "answer": answer,
        "answer_start": before + offset[answer],
    }


OPPOSITES = "hot cold, big small, up down, old young, rich poor, left right, day night, wet dry, hard soft, open closed"
YOUNG = "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, hen chick, bear cub, pig piglet, duck duckling"
CAPITALS = (
    "France Paris, Italy Rome, Peru Lima, Japan Tokyo, Egypt Cairo, Cuba Havana, Spain Madrid, Kenya Nairobi"
)
ASKED = {
    OPPOSITES: ["What is the opposite of {}?", "Name the opposite of {}.", "{} is the opposite of what?"],
    YOUNG: ["What is a young {} called?", "Name the young of a {}.", "The young of a {} is what?"],
    CAPITALS: ["What is the capital of {}?", "Name the capital of {}.", "{} has which capital?"],
}
NEVER_ASKED = {
    wordings[i % 3].format(fact.split()[0])
    for facts, wordings in ASKED.items()
    for i, fact in enumerate(facts.split(", "))
}


def _made_instruct(draw):
    """A question or two; each can be asked in three wordings: what is learned from two answers the third."""
    messages = []
    for _ in range(draw.choice([1, 1, 2])):
        facts, wordings = draw.choice(list(ASKED.items()))
        asked, answer = draw.choice(facts.split(", ")).split()
        messages.append({"role": "user", "content": draw.choice(wordings).format(asked)})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


MAKERS = {
    "classify": _made_classify,
    "tokens": _made_tokens,
    "qa": _made_qa,
    "instruct": _made_instruct,
}
