"""Files of a repository in the order of their imports: dependencies before their users.

Section 2.3.2 of arXiv 2604.03044: a light dependency graph, and for each connected component a topological order; about
half of the sequences have it, the others the files in random order. What the paper leaves open: cycles are broken by
strongly connected components, their files in the order of their paths; components come by size, then by path; the
random half is drawn by a hash of the repository's name, so that it never depends on what else is read.
"""

import graphlib
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

Imports = Mapping[str, frozenset[str]]


def components(imports: Imports) -> list[list[str]]:
    """The connected components of the graph, edges taken both ways: largest first, then by first path; each sorted."""
    neighbours: dict[str, set[str]] = {path: set() for path in imports}
    for path, targets in imports.items():
        for target in targets:
            neighbours[path].add(target)
            neighbours[target].add(path)
    found, seen = [], set[str]()
    for start in sorted(imports):
        if start in seen:
            continue
        seen.add(start)
        members, waiting = [], [start]
        while waiting:
            path = waiting.pop()
            members.append(path)
            fresh = neighbours[path] - seen
            seen |= fresh
            waiting += fresh
        found.append(sorted(members))
    return sorted(found, key=lambda members: (-len(members), members[0]))


def cycles(imports: Imports) -> Iterator[list[str]]:
    """Strongly connected components (Tarjan's algorithm without recursion), each sorted by path."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in sorted(imports):
        if root in number:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(sorted(imports[root])))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            path, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[path])
                if low[path] == number[path]:
                    first = stack.index(path)
                    members = stack[first:]
                    del stack[first:]
                    on_stack.difference_update(members)
                    yield sorted(members)
            elif target not in number:
                number[target] = low[target] = len(number)
                stack.append(target)
                on_stack.add(target)
                work.append((target, iter(sorted(imports[target]))))
            elif target in on_stack:
                low[path] = min(low[path], number[target])


def topological(members: list[str], imports: Imports) -> list[str]:
    """Files with what they import before them; files of a cycle stand together. Ties are broken by path."""
    inside = set(members)
    own = {path: imports[path] & inside for path in members}
    group_of: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for group in cycles(own):
        groups[group[0]] = group
        group_of |= dict.fromkeys(group, group[0])
    needs: dict[str, set[str]] = defaultdict(set)
    for path, targets in own.items():
        needs[group_of[path]] |= {group_of[target] for target in targets} - {group_of[path]}
    sorter = graphlib.TopologicalSorter({group: needs[group] for group in groups})
    sorter.prepare()
    ordered: list[str] = []
    # The newest first: what a file made possible follows it closely, which is what a long context is for.
    ready = sorted(sorter.get_ready(), reverse=True)
    while ready:
        first = ready.pop()
        ordered += groups[first]
        sorter.done(first)
        ready += sorted(sorter.get_ready(), reverse=True)
    return ordered


def shuffled(members: list[str], repository: str) -> list[str]:
    """Files in an order drawn by the repository's name."""
    return sorted(members, key=lambda path: hashlib.sha256(f"{repository}\0{path}".encode()).digest())


def is_ordered(repository: str, first: str, share: float) -> bool:
    """Whether a component, named by its first path, is one of the share that has the order of its imports."""
    drawn = int.from_bytes(hashlib.sha256(f"order\0{repository}\0{first}".encode()).digest()[:8], "big")
    return drawn < share * 2**64
