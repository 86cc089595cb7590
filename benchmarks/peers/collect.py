"""Scores a peer's answers with this project's metrics, and writes them as a folder that `kvpress report` reads.

    python benchmarks/peers/collect.py --samples samples.jsonl --answers answers.jsonl --query-aware --output results/peer-aware

An answer that could not be given (the peer raised an error) counts as empty.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvpress.longbench.runner import Answer, Method, ResultStore
from kvpress.longbench.runner.evaluate import result_row
from kvpress.longbench.runner.totals import totals_of
from kvpress.longbench.sample import Sample

FIELDS = ("prediction", "prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds", "cache_bytes", "full_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--peer", default="nvidia", help="stands before the names of its methods")
    parser.add_argument("--query-aware", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    samples = {}
    for line in arguments.samples.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)["sample"]
        lists = {name: tuple(fields[name]) for name in ("references", "groups")}
        samples[fields["sample_id"]] = Sample(**{**fields, **lists})
    settings = {"benchmark": "ruler", "peer": arguments.peer, "query_aware": arguments.query_aware}
    errors = 0
    with ResultStore(arguments.output, settings, command=["python", *sys.argv]) as store:
        for line in arguments.answers.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            method = Method(f"{arguments.peer}_{row['press']}", round(1 - row["ratio"], 6))
            errors += row["error"] is not None
            if row["id"] not in store.done(method.label):
                answer = Answer(*(row[name] for name in FIELDS))
                store.append({**result_row(method, samples[row["id"]], answer), "error": row["error"]})
        store.write_skipped([])
        store.write_totals(totals_of(store.rows))
    print(f"{len(store.rows)} results in {arguments.output}, {errors} of them errors of the peer")


if __name__ == "__main__":
    main()
