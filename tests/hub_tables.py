"""Folders in the hub's layout: parquet files, named splits, a README with configurations."""

import datasets


def write_nq(folder, questions, held_out):
    """NQ-open's own layout: one configuration, two splits, `question` and a list of `answer`."""
    (folder / "nq_open").mkdir(parents=True)
    for split, rows in (("train", questions), ("validation", held_out)):
        table = datasets.Dataset.from_dict(
            {"question": [q for q, _ in rows], "answer": [list(a) for _, a in rows]}
        )
        table.to_parquet(folder / "nq_open" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nlicense: cc-by-sa-3.0\nconfigs:\n- config_name: nq_open\n  data_files:\n"
        "  - split: train\n    path: nq_open/train-*\n"
        "  - split: validation\n    path: nq_open/validation-*\n  default: true\n---\n"
    )
    return folder


def write_trivia(folder, questions, held_out):
    """TriviaQA's `unfiltered.nocontext`: answers are objects with `value` and `aliases`."""
    (folder / "unfiltered.nocontext").mkdir(parents=True)
    for split, rows in (("train", questions), ("validation", held_out)):
        kind = {"type": "WikipediaEntity"}
        answers = [{"value": a[0], "aliases": list(a), **kind} for _, a in rows]
        asked = {"question": [q for q, _ in rows], "answer": answers}
        table = datasets.Dataset.from_dict(asked)
        table.to_parquet(folder / "unfiltered.nocontext" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: unfiltered.nocontext\n  data_files:\n"
        "  - split: train\n    path: unfiltered.nocontext/train-*\n"
        "  - split: validation\n    path: unfiltered.nocontext/validation-*\n---\n"
    )
    return folder


def write_wiki(folder, passages, files=2):
    """wiki_dpr's passages without embeddings, in several files."""
    home = folder / "data" / "psgs_w100" / "no_embeddings"
    home.mkdir(parents=True)
    size = -(-len(passages) // files)
    for number in range(files):
        part = passages[number * size : (number + 1) * size]
        table = datasets.Dataset.from_list([vars(passage) for passage in part])
        table.to_parquet(home / f"train-{number:05}-of-{files:05}.parquet")
    return folder


def write_pools(folder, rows):
    """Tevatron's layout; rows are (query, answers, positive passages, negative passages)."""
    (folder / "default").mkdir(parents=True)

    def objects(passages):
        return [{"docid": p.id, "title": p.title, "text": p.text} for p in passages]

    columns = list(zip(*rows, strict=True))
    table = datasets.Dataset.from_dict(
        {
            "query_id": [str(i) for i in range(len(rows))],
            "query": columns[0],
            "answers": [list(a) for a in columns[1]],
            "positive_passages": list(map(objects, columns[2])),
            "negative_passages": list(map(objects, columns[3])),
        }
    )
    table.to_parquet(folder / "default" / "wikipedia-nq-dev.parquet")
    return folder
