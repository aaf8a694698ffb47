"""How the next job of the ranks differs from what was asked for, so that it fits.

The options are those of the server, for the hosts that take part. Where the ranks say
that the model does not fit, `remedy` gives what may help, the least change first.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

from mlxtp.cluster import hostfile
from mlxtp.generation.choices import NGRAM
from mlxtp.job_options import AUTO
from mlxtp.partition.shares import Share, Shares
from mlxtp.serve.hosts import UNREACHED, Hosts


class Remedy(NamedTuple):
    """What may let the model fit.

    `words` say it. `of_hosts`: who takes part is decided anew, with or without cables.
    """

    words: str
    of_hosts: bool = True
    takes_cables: bool = True


class NextJob:
    """The options of the next job.

    Args:
        args: the server's options.
        hosts: which hosts take part.
    """

    def __init__(self, args: argparse.Namespace, hosts: Hosts) -> None:
        self._args, self._hosts = args, hosts
        self._is_without_draft = False
        self._is_by_memory = False  # the ranks choose shares that fit
        self._has_tried_all = False  # with the hosts that were left out
        self._fitted: dict[str, int] | None = None  # hosts, until the next is ready

    def note_ready(self) -> None:
        """Note that a job fits."""
        self._fitted, self._has_tried_all = None, False

    def note_fitted(self) -> None:
        """Note that the job which makes room for a larger one did fit."""
        self._fitted = dict(self._hosts.part)

    def note_grown(self) -> None:
        """Note that a host takes part which did not before."""
        self._is_without_draft = False  # it may have room again

    def remedy(self) -> Remedy | None:
        """Take a way to a job that fits; None where none is left but to wait."""
        hosts = self._hosts
        if self._args.draft_model not in (None, NGRAM) and not self._is_without_draft:
            self._is_without_draft = True
            return Remedy("going on without the draft model", of_hosts=False)
        fitted, self._fitted = self._fitted, None
        if fitted and (new := [host for host in hosts.part if host not in fitted]):
            hosts.leave_out(new)
            return Remedy(f"going on without {', '.join(new)}")
        if (
            not self._is_by_memory
            and self._args.shares != "auto"
            and hosts.part != hosts.slots
            and self.count() > 1
        ):
            self._is_by_memory = True
            return Remedy("shares go by memory", of_hosts=False)
        if hosts.takes_cables and UNREACHED in hosts.missing.values():
            return Remedy("hosts that no cable reaches take part", takes_cables=False)
        if not self._has_tried_all and hosts.take_in_left_out():
            self._has_tried_all = True
            return Remedy("hosts that were left out take part again")
        return None

    def arguments(self) -> argparse.Namespace:
        """Return the options of the ranks of this job."""
        hosts, given = self._hosts, vars(self._args)
        if self._is_without_draft:
            given = {**given, "draft_model": None, "draft": AUTO, "draft_rank": None}
        if hosts.part == hosts.slots:
            return argparse.Namespace(**given)
        shares = self._args.shares
        if self._is_by_memory:
            shares = "auto"
        elif isinstance(shares, Shares):
            shares = self._shares_left(shares)
        return argparse.Namespace(**{**given, "shares": shares})

    def count(self) -> int:
        """How many ranks there are on the hosts that take part."""
        there = len(self._hosts.ranks)
        return min(there, self._args.ranks or there)

    def _shares_left(self, given: Shares) -> Shares | None:
        """Return the shares of the ranks that are left; None where they do not do.

        A host that takes the place of a lost one takes its share. Query heads that went
        one by one do not lie well for fewer ranks: these take whole groups.
        """
        own: dict[str, list[Share]] = {}
        for host, share in zip(
            hostfile.by_rank(self._hosts.slots), given, strict=False
        ):
            own.setdefault(host, []).append(share)
        lost = [
            x for h, those in own.items() if h not in self._hosts.part for x in those
        ]
        shares = []
        for host in self._hosts.ranks[: self.count()]:
            left = own.get(host) or lost
            if not left:
                return None
            shares.append(left.pop(0))
        if len(shares) < len(given):
            shares = [replace(share, by_query=False) for share in shares]
        return Shares(shares)
