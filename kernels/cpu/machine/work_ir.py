"""LLVM IR that all compiled operations share: loading arguments, and the loop in which threads take tickets."""

from collections.abc import Collection, Sequence


def load_arguments(names: Sequence[str], only: Collection[str] = ()) -> str:
    """Returns code that loads 64-bit arguments at ``%args``, in the order of their names; all, or ``only`` some."""
    return "".join(
        f"\n  %at_{name} = getelementptr i64, ptr %args, i64 {i}\n  %{name} = load i64, ptr %at_{name}"
        for i, name in enumerate(names)
        if name in (only or names)
    )


def take_tickets(total: str, body: str) -> str:
    """Returns a loop that distributes ``%total`` items over threads, at most ``%unit`` of them at a time.

    It jumps to the label ``body`` for items ``%first`` to ``%stop``, which no other thread gets, and to ``end`` when
    none is left. It needs the address ``%ticket`` of a counter that is 0 at first. The body is entered from ``%begin``
    and must go on to ``%take``.
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
