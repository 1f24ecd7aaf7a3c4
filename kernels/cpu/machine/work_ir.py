"""LLVM IR that every work has: its job's fields, and the loop in which threads take what there is to do by tickets."""

from collections.abc import Sequence


def load_job(names: Sequence[str]) -> str:
    """Loads the 64-bit fields of ``%job`` of these names."""
    return "".join(
        f"\n  %at_{name} = getelementptr i64, ptr %job, i64 {i}\n  %{name} = load i64, ptr %at_{name}"
        for i, name in enumerate(names)
    )


def take_tickets(total: str, body: str) -> str:
    """Goes to the label ``body`` for things from ``%first`` to ``%stop``, ``%unit`` at most, of ``%total``.

    Those of one thread are nobody else's. Needs the address ``%ticket`` of a counter, 0 at first. The body comes from
    ``%begin`` and goes on to ``%take``; the label ``end`` is reached when nothing is left.
    """
    return f"""
  %ticket_ptr = inttoptr i64 %ticket to ptr
  br label %take
take:
  %number = atomicrmw add ptr %ticket_ptr, i64 1 acq_rel
  %first = mul i64 %number, %unit
  %is_work = icmp slt i64 %first, %{total}
  br i1 %is_work, label %begin, label %end
begin:
  %first_stop = add i64 %first, %unit
  %is_last = icmp sgt i64 %first_stop, %{total}
  %stop = select i1 %is_last, i64 %{total}, i64 %first_stop
  br label %{body}"""
