# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The tables of the report of `deltamem eval`, each as Markdown lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deltamem_vllm.evaluation.eval import markdown
from deltamem_vllm.evaluation.eval.aggregate import KL_BIN, Aggregate
from deltamem_vllm.evaluation.eval.comparison import SIGNIFICANCE, Measure, Versus, compare, versus
from deltamem_vllm.evaluation.eval.grid import FULL
from deltamem_vllm.evaluation.eval.tables import Column, EvalTable, Group
from deltamem_vllm.evaluation.statistics import Estimate

_MARKS = {"best": "**{}**", "level": "{} =", "worse": "{}"}
_MOST_BINS = 8


def at_a_glance(table: EvalTable) -> list[str]:
    """Best policy at each budget, with all that cannot be told from it."""
    lines = []
    for setting in table.settings:
        for length in table.lengths:
            groups = table.asked_groups(length, setting)
            cells = [_winner(table, groups, budget) for budget in table.budgets]
            if any(cell != markdown.ABSENT for cell in cells):
                lines.append((setting, str(length), *cells))
    return markdown.table(("setting", "tokens", *map(markdown.percent, table.budgets)), lines)


def _winner(table: EvalTable, groups: Sequence[Group], budget: float) -> str:
    found = compare(table, groups, budget, "retention")
    if not found:
        return markdown.ABSENT
    best, level = ([name for name, c in found.items() if c.standing == standing] for standing in ("best", "level"))
    value = table.aggregate(groups, Column(best[0], budget)).retention
    assert value is not None, "the best has a value, or there would be no best"
    text = f"**{', '.join(best)}** {markdown.share(value).partition(' ')[0]}"
    return f"{text} = {', '.join(level)}" if level else text


def pooled(table: EvalTable, measure: Measure) -> list[str]:
    """Policy against budget by setting and length, for log-probs over the tasks that the full cache does not fail."""
    lines = []
    for setting in table.settings:
        for length in table.lengths:
            if table.groups(length, setting):
                asked = table.asked_groups(length, setting)
                groups = asked if measure == "retention" else table.pooled_groups(length, setting)
                lines += [f"**{setting}, {length} tokens.** {_pooled_over(table, length, setting, groups)}", ""]
                lines += _pooled_table(table, groups, measure)
    return lines


def _pooled_over(table: EvalTable, length: int, setting: str, pooled_groups: Sequence[Group]) -> str:
    scores = {group.task: score for group in pooled_groups if (score := table.full_score(group)) is not None}
    right = {task: round(score.value * score.count) for task, score in scores.items()}
    asked = sum(score.count for score in scores.values())
    text = f"The full cache solves {sum(right.values())} of {asked} questions of {markdown.plural(len(scores), 'task')}"
    text += f": {', '.join(f'{task} {right[task]}/{scores[task].count}' for task in scores)}." if scores else "."
    groups = table.groups(length, setting)
    failed = [group.task for group in groups if table.full_cache_fails(group) and group not in pooled_groups]
    unknown = [group.task for group in groups if not table.full_rows(group)]
    if failed:
        text += f" Left out, full cache fails: {', '.join(failed)}."
    if unknown:
        text += f" Left out, full cache not measured yet: {', '.join(unknown)}."
    return text


def _pooled_table(table: EvalTable, groups: Sequence[Group], measure: Measure) -> list[str]:
    if not groups:
        return ["Nothing to pool.", ""]
    standings = {budget: compare(table, groups, budget, measure) for budget in table.budgets}
    lines = [(FULL, *("1" if measure == "retention" else "0" for _ in table.budgets))]
    for policy in table.policies:
        if policy == FULL:
            continue
        cells = []
        for budget in table.budgets:
            estimate = _estimate(table.aggregate(groups, Column(policy, budget)), measure)
            shown = markdown.share(estimate) if measure == "retention" else markdown.mean(estimate)
            if estimate is not None and policy in standings[budget]:
                if "n=" not in shown:
                    shown += f" n={estimate.count}"
                shown = _MARKS[standings[budget][policy].standing].format(shown)
            cells.append(shown)
        lines.append((policy, *cells))
    return markdown.table(("policy", *map(markdown.percent, table.budgets)), lines)


def _estimate(aggregate: Aggregate, measure: Measure) -> Estimate | None:
    return aggregate.retention if measure == "retention" else aggregate.drop


def paired(table: EvalTable) -> list[str]:
    """The grid's pairs of policies, on the same samples: how often only one of them solves what the full cache does."""
    lines = []
    for setting in table.settings:
        for length in table.lengths:
            groups = table.asked_groups(length, setting)
            for mine, theirs in table.conditions["grid"].get("pairs", ()):
                found = [versus(table, groups, budget, mine, theirs) for budget in table.budgets]
                if any(one is not None for one in found):
                    lines.append((setting, str(length), f"{mine} : {theirs}", *map(_versus_cell, found)))
    head = ("setting", "tokens", "policies", *map(markdown.percent, table.budgets))
    return markdown.table(head, lines) if lines else []


def _versus_cell(found: Versus | None) -> str:
    if found is None:
        return markdown.ABSENT
    text = f"{found.wins}:{found.losses} of {found.count}"
    return f"**{text}**" if found.p_value < SIGNIFICANCE else text


def fidelity(table: EvalTable) -> list[str]:
    """KL and agreement on texts without a question, policy against budget."""
    lines = []
    for group in table.text_groups():
        samples = markdown.plural(len(table.full_rows(group)), "text")
        lines += [f"**{group.task}, {group.length} tokens**, {samples}", ""]
        rows = []
        for policy in table.policies:
            cells = [_fidelity_cell(table.aggregate([group], Column(policy, budget))) for budget in table.budgets]
            if policy == FULL:
                cells = ["0, 100%" for _ in table.budgets]
            rows.append((policy, *cells))
        lines += markdown.table(("policy", *map(markdown.percent, table.budgets)), rows)
        lines += _by_position(table, group)
    return lines


def _fidelity_cell(aggregate: Aggregate) -> str:
    if aggregate.agreement is None:
        return markdown.ABSENT
    return f"{markdown.mean(aggregate.kl)}, {markdown.percent(aggregate.agreement.value)}"


def _by_position(table: EvalTable, group: Group) -> list[str]:
    series = {column: table.aggregate([group], column).kl_by_position() for column in table.columns}
    longest = max(map(len, series.values()), default=0)
    if table.kind(group) != "generation" or longest < 2:
        return []
    merged = -(-longest // _MOST_BINS)
    starts = range(0, longest, merged)
    head = [f"{start * KL_BIN + 1}-{min(start + merged, longest) * KL_BIN}" for start in starts]
    rows = []
    for (policy, budget), values in series.items():
        if policy != FULL and values:
            bins = [values[start : start + merged] for start in starts]
            cells = [markdown.number(sum(part) / len(part)) if part else markdown.ABSENT for part in bins]
            rows.append((f"{policy} {markdown.percent(budget)}", *cells))
    summary = f"{group.task}, {group.length} tokens: KL by position of the generated token"
    return markdown.details(summary, markdown.table(("policy", *head), rows))


def full_scores(table: EvalTable) -> list[str]:
    """What the full cache solves: tasks against settings and lengths."""
    columns = [(setting, length) for setting in table.settings for length in table.lengths]
    tasks = sorted({group.task for setting, length in columns for group in table.groups(length, setting)})
    rows = []
    for task in tasks:
        cells = []
        for setting, length in columns:
            group = Group(length, setting, task)
            score = table.full_score(group) if group in table.groups(length, setting) else None
            fails = score is not None and table.full_cache_fails(group)
            cells.append(markdown.counts(score) + (" full cache fails" if fails else ""))
        rows.append((task, *cells))
    return markdown.table(("task", *(f"{setting} {length}" for setting, length in columns)), rows)


def residence(table: EvalTable) -> list[str]:
    """Bytes held against the budget."""
    rows = []
    for length in table.lengths:
        for policy in table.policies:
            budgets = [1.0] if policy == FULL else table.budgets
            cells = []
            for budget in budgets:
                held = table.residence(length, Column(policy, budget))
                shown = markdown.ABSENT
                if held is not None:
                    shown = f"{100 * held.median:.1f}% (most {100 * held.most:.1f}%)"
                    if held.over:
                        shown += f" **over: {held.over} of {held.count}**"
                cells.append(shown)
            if policy == FULL:
                cells = [cells[0], *([markdown.ABSENT] * (len(table.budgets) - 1))]
            if any(cell != markdown.ABSENT for cell in cells):
                name = f"{policy} (at 100%)" if policy == FULL else policy
                rows.append((f"{length}", name, *cells))
    return markdown.table(("tokens", "policy", *map(markdown.percent, table.budgets)), rows)


def by_task(table: EvalTable) -> list[str]:
    """Every task by itself, folded up by setting and length."""
    lines = []
    for setting in table.settings:
        for length in table.lengths:
            groups = table.groups(length, setting)
            if groups:
                lines += markdown.details(f"{setting}, {length} tokens, by task", _task_tables(table, groups))
    return lines


def _task_tables(table: EvalTable, groups: Sequence[Group]) -> list[str]:
    lines = ["Retention: solved, of what the full cache solves", ""]
    lines += _task_table(table, groups, lambda a: markdown.counts(a.retention), _full_count, also_failed=True)
    lines += ["Log-prob per answer token lost against the full cache, nats", ""]
    lines += _task_table(table, groups, lambda a: markdown.mean(a.drop), lambda a: "0" if a.pairs else markdown.ABSENT)
    lines += ["KL to the full cache on answer tokens, nats, and agreement", ""]
    lines += _task_table(table, groups, _fidelity_cell, lambda a: "0, 100%" if a.pairs else markdown.ABSENT)
    several = [group for group in groups if any(len(row["answers"]) > 1 for row in table.full_rows(group).values())]
    if several:
        lines += ["Partial credit: share of single values right, of all that were asked", ""]
        lines += _task_table(table, several, _credit, _credit)
    return lines


def _task_table(
    table: EvalTable,
    groups: Sequence[Group],
    cell: Callable[[Aggregate], str],
    full: Callable[[Aggregate], str],
    *,
    also_failed: bool = False,
) -> list[str]:
    rows = []
    for column in table.columns:
        cells = []
        for group in groups:
            aggregate = table.aggregate([group], column)
            if column.policy == FULL:
                fails = table.full_cache_fails(group)
                cells.append(full(aggregate) + (" full cache fails" if fails else ""))
            else:
                hidden = table.full_cache_fails(group) and not also_failed
                cells.append(markdown.ABSENT if hidden else cell(aggregate))
        rows.append((f"{column.policy} {markdown.percent(column.budget)}", *cells))
    return markdown.table(("policy", *(group.task for group in groups)), rows)


def _full_count(aggregate: Aggregate) -> str:
    if not aggregate.pairs or aggregate.retention is None:
        return f"0/{aggregate.asked}" if aggregate.pairs else markdown.ABSENT
    return f"{aggregate.retention.count}/{aggregate.asked}"


def _credit(aggregate: Aggregate) -> str:
    return markdown.ABSENT if aggregate.credit is None else f"{aggregate.credit:.2f}"
