"""VizWiz against golden data: the official scores of real predictions, other scorers' on the same, LLaVA's prompts and upload."""

import json
import random
from functools import cache

import pytest

from components.benchmarks.benchmark import Question, text_only_best
from components.benchmarks.normalization import evalai, vqa_v2
from components.benchmarks.vizwiz import PROMPT, VizWiz
from components.errors import RecipeError

PREDICTIONS = [f"lfvqa_{name}" for name in "blip2 crowd_majority gemini gpt-4v instruct_blip llava qwen".split()]
PREDICTIONS += [
    f"mmml_{name}" for name in "clip_skill_aware3 frozen_git frozen_vilt2 oracle_ensemble t5 zero_shot_git_large".split()
]
RULES = PROMPT.removeprefix("{question}")


def read(golden, name):
    return json.loads((golden / "vizwiz_vqa" / name).read_text(encoding="utf-8"))


def jsonl(golden, name):
    return [json.loads(line) for line in (golden / "vizwiz_vqa" / name).read_text(encoding="utf-8").splitlines()]


@cache
def expected(golden):
    return read(golden, "EXPECTED.json")["expected"]


def made(folder, split="val"):
    benchmark = VizWiz(str(folder), split)
    benchmark.setup(pictures=False)
    return benchmark


@pytest.fixture
def val(golden, tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(read(golden, "annotations.json")))
    return made(tmp_path)


def answered(golden, benchmark, name):
    answers = {benchmark.question_id(row): row["answer"] for row in read(golden, f"pred_{name}.json")}
    return [question for question in benchmark.questions() if question.id in answers], answers


def crowd(*answers):
    return Question("x", "", ("x",), answers[0], "other", {"answers": list(answers), "answer_type": "other", "answerable": 1})


def percent(value):
    return round(100 * value, 2)


# --- against the official scorers


@pytest.mark.parametrize("name", PREDICTIONS)
def test_official_scores(golden, val, name):
    asked, answers = answered(golden, val, name)
    everything = expected(golden)[f"pred_{name}.json"]
    official = everything["official_vizwiz"]
    metrics = val.score(answers, asked)
    assert metrics["count"] == official["n"] == len(answers)
    assert percent(metrics["accuracy"]) == official["accuracy_overall"]
    by_type = {key.removeprefix("accuracy/"): percent(value) for key, value in metrics.items() if key.startswith("accuracy/")}
    assert by_type == official["accuracy_perAnswerType"]
    unanswerability = {"average_precision": percent(metrics["answerability_ap"]), "f1_score": percent(metrics["answerability_f1"])}
    assert unanswerability == official["unanswerability"]
    assert everything["tri_vlm_evaluation"] == {"overall": percent(metrics["accuracy"])} | unanswerability
    credits = {question.id: percent(val.credit(question, answers[question.id])) for question in asked}
    assert {name: credit for name, credit in credits.items() if credit} == everything["per_image_official_vizwiz_nonzero"]


def test_official_scores_case_by_case(golden, val):
    cases = expected(golden)["soft_accuracy_cases.jsonl"]
    rows = jsonl(golden, "soft_accuracy_cases.jsonl")
    assert [{key: case[key] for key in ("prediction", "answers")} for case in cases] == rows
    assert len(rows) == 51
    for case in cases:
        credit = round(100 * val.credit(crowd(*case["answers"]), case["prediction"]), 4)
        assert credit == case["official_vizwiz"] == case["tri_vlm_evaluation"], case


def test_one_person_is_left_out_as_the_old_api_does_not(golden, val):
    differing = 0
    for name in PREDICTIONS:
        everything = expected(golden)[f"pred_{name}.json"]
        if everything["old_api_accuracy_overall"] != everything["official_vizwiz"]["accuracy_overall"]:
            asked, answers = answered(golden, val, name)
            assert percent(val.score(answers, asked)["accuracy"]) < everything["old_api_accuracy_overall"], name
            differing += 1
    assert differing == 10
    differing = 0
    for case in expected(golden)["soft_accuracy_cases.jsonl"]:
        if case["old_api"] != case["official_vizwiz"]:
            assert round(100 * val.credit(crowd(*case["answers"]), case["prediction"]), 4) < case["old_api"], case
            differing += 1
    assert differing == 7


# --- against scorers of other benchmarks: the same pieces put together in their way


def as_evalai(benchmark, answers, answer):
    return benchmark.worth(crowd(*map(evalai, answers))).get(evalai(answer), 0.0)


def as_vqa_v2(benchmark, answers, answer):
    # GT-Vision-Lab's code leaves unanimous answers, and the answers to them, as they are
    normalize = vqa_v2 if len(set(answers)) > 1 else lambda text: text.replace("\n", " ").replace("\t", " ").strip()
    return benchmark.worth(crowd(*map(normalize, answers))).get(normalize(answer), 0.0)


def test_other_scorers_on_real_predictions(golden, val):
    facts = {question.id: question.facts["answers"] for question in val.questions()}
    for name in PREDICTIONS:
        everything, (_, answers) = expected(golden)[f"pred_{name}.json"], answered(golden, val, name)
        credits = {key: as_evalai(val, facts[key], answer) for key, answer in answers.items()}
        overall = percent(sum(credits.values()) / len(credits))
        assert overall == everything["lmms-eval_EvalAI_processor"] == everything["llava_m4c_TextVQAAccuracyEvaluator"], name
        assert {key: percent(value) for key, value in credits.items() if value} == everything["per_image_lmms_eval_nonzero"], name
        credits = {key: as_vqa_v2(val, facts[key], answer) for key, answer in answers.items()}
        assert percent(sum(credits.values()) / len(credits)) == everything["vqa_v2_official_GT-Vision-Lab"], name


def test_other_scorers_case_by_case(golden, val):
    for case in expected(golden)["soft_accuracy_cases.jsonl"]:
        assert round(100 * as_evalai(val, case["answers"], case["prediction"]), 4) == case["lmms_eval"], case
        assert round(100 * as_vqa_v2(val, case["answers"], case["prediction"]), 4) == case["vqa_v2_official"], case


# --- the whole and resamples


def test_metrics_of_resamples_and_of_the_whole(golden, val):
    asked, answers = answered(golden, val, "mmml_frozen_git")
    tally = val.tally(asked, answers)
    assert len(tally.units) == 51
    assert set(tally.strata) == {0}
    resampled = val.metrics(tally.resampled(20))
    assert {name: values.shape for name, values in resampled.items()} == dict.fromkeys(val.metrics(tally.totals()), (20,))
    one = val.metrics({name: values[3] for name, values in tally.resampled(20).items()})
    assert {name: float(value) for name, value in one.items()} == {name: values[3] for name, values in resampled.items()}
    assert [name for name in resampled if "/" not in name] == ["accuracy", "answerability_ap", "answerability_f1"]


def test_order_does_not_count_and_ids_must_match(golden, val):
    asked, answers = answered(golden, val, "lfvqa_gemini")
    shuffled = list(answers.items())
    random.Random(0).shuffle(shuffled)
    assert val.score(dict(shuffled), asked[::-1]) == val.score(answers, asked)
    with pytest.raises(RecipeError, match=r"1 of 296 questions have no answer: VizWiz_train_00013289\.jpg"):
        val.score({name: answer for name, answer in answers.items() if name != "VizWiz_train_00013289.jpg"})
    with pytest.raises(RecipeError, match=r"1 of 297 answers are to questions that were not asked: VizWiz_val_99999999\.jpg"):
        val.score(answers | {"VizWiz_val_99999999.jpg": "yes"})


# --- split test, LLaVA's prompts and upload


@pytest.fixture
def llava_test(golden, tmp_path):
    raw = jsonl(golden, "llava-v1.5-13b_test_raw.jsonl")
    (tmp_path / "test.json").write_text(json.dumps([{"image": row["image"], "question": "what is this"} for row in raw]))
    return made(tmp_path, "test"), raw


def test_upload_of_llava(golden, llava_test):
    benchmark, raw = llava_test
    answers = {benchmark.question_id({"question_id": row["question_id"]}): row["text"] for row in reversed(raw)}
    assert benchmark.upload(answers) == read(golden, "llava-v1.5-13b_test_upload.json")
    assert len(answers) == expected(golden)["llava-v1.5-13b_test_upload.json"]["n"] == 4000
    del answers["VizWiz_test_00000000.jpg"]
    assert benchmark.upload(answers) is None


def test_test_has_no_score(golden, llava_test, val):
    benchmark, _ = llava_test
    asked = benchmark.draw(10)
    answers = {question.id: "yes" for question in asked}
    assert benchmark.score(answers, asked) == {"count": 10.0}
    assert benchmark.metrics(benchmark.tally(asked, answers).resampled(5)) == {}
    assert (benchmark.headline, val.headline) == ("", "accuracy")
    assert benchmark.worth(asked[0]) == {}
    assert set(text_only_best(benchmark, asked).values()) == {""}
    assert set(benchmark.not_available()) == {"accuracy", "answerability_ap", "answerability_f1"}
    assert val.not_available() == {}
    assert val.upload({question.id: "yes" for question in val.questions()}) is None


@pytest.mark.parametrize("spelled", [str, str.lower, str.upper, str.swapcase])
def test_prompts_of_llava(golden, tmp_path, spelled):
    rows = jsonl(golden, "llava_test_first50.jsonl")
    # only LLaVA's spelling is at hand; whatever letter case the distributed file has, it must come out
    raw = [{"image": row["image"], "question": spelled(row["text"].removesuffix(RULES))} for row in rows]
    (tmp_path / "test.json").write_text(json.dumps(raw))
    asked = made(tmp_path, "test").questions()
    assert [question.prompt for question in asked] == [f"<image>\n{row['text']}" for row in rows]
    assert [VizWiz("", "test").question_id({"question_id": row["question_id"]}) for row in rows] == [q.id for q in asked]
