"""LLVM IR of ``program``, which runs a list of operations on one team of threads.

Every thread of the team runs ``program``. An operation is a C function and the address of its arguments. After each
operation the threads meet at a barrier, so that none begins one before all have left the one before.
"""

from kernels.cpu.machine.target import Target
from kernels.cpu.machine.work_ir import load_arguments

PROGRAM = ("num_operations", "operations", "arrived", "generation", "team_size", "yield", "sleep", "stop", "spins")
"""The arguments of ``program``, 64 bits each: the number of operations; the address of the operations, each the address
of a function and that of its arguments; the addresses of two counters, 0 at first; the addresses of the C functions
``omp_get_num_threads`` (0 where there is one thread), ``sched_yield`` and ``usleep``; the address of a word that an
operation sets to end the program; and how often a thread spins at a barrier before it yields the core, perhaps to the
thread that it waits for."""

# How often it yields before it sleeps. Another thread waits for the network then, and all others wait for that thread.
_YIELDS = 1000
_SLEEP_US = 50
# The generation after which all threads leave. The last to arrive at a barrier checks for all whether the program is to
# end, since a thread that checked later might see what the next operation has set.
_ENDS = -1


def program(target: Target) -> str:
    """Returns the function ``@program(args)``.

    The barrier counts arrivals, and the thread that arrives last begins the next generation.
    """
    return f"""
{_declared(target)}
define void @program(ptr %args) {{
entry:{load_arguments(PROGRAM)}
  %operations_ptr = inttoptr i64 %operations to ptr
  %arrived_ptr = inttoptr i64 %arrived to ptr
  %generation_ptr = inttoptr i64 %generation to ptr
  %yield_ptr = inttoptr i64 %yield to ptr
  %sleep_ptr = inttoptr i64 %sleep to ptr
  %stop_ptr = inttoptr i64 %stop to ptr
  %most_waits = add i64 %spins, {_YIELDS}{_TEAM_SIZE}
  br label %each
each:
  %i = phi i64 [0, %begin], [%i_next, %passed]
  %i_next = add i64 %i, 1
  %word = shl i64 %i, 1
  %function_at = getelementptr i64, ptr %operations_ptr, i64 %word
  %function = load i64, ptr %function_at
  %argument_at = getelementptr i64, ptr %function_at, i64 1
  %argument = load i64, ptr %argument_at
  %function_ptr = inttoptr i64 %function to ptr
  %argument_ptr = inttoptr i64 %argument to ptr
  call void %function_ptr(ptr %argument_ptr){_barrier(target)}
  %goes_on = icmp ne i64 %reached, {_ENDS}
  %is_left = icmp slt i64 %i_next, %num_operations
  %more = and i1 %goes_on, %is_left
  br i1 %more, label %each, label %end
end:
  ret void
}}
"""


def _declared(target: Target) -> str:
    """Returns the declaration of the function of the target's pause, if any."""
    if target.pause is None:
        return ""
    name, argument = target.pause
    return f"declare void @{name}({argument.split(' ', 1)[0]})\n"


def _pause(target: Target) -> str:
    """Returns the call of the target's pause, if any."""
    return "" if target.pause is None else f"\n  call void @{target.pause[0]}({target.pause[1]})"


# The number of the thread that arrives last at a barrier, from 0, of as many as there are.
_TEAM_SIZE = """
  %alone = icmp eq i64 %team_size, 0
  br i1 %alone, label %begin, label %ask
ask:
  %team_size_ptr = inttoptr i64 %team_size to ptr
  %asked = call i32 %team_size_ptr()
  br label %begin
begin:
  %size_32 = phi i32 [1, %entry], [%asked, %ask]
  %size = sext i32 %size_32 to i64
  %last = sub i64 %size, 1"""


def _barrier(target: Target) -> str:
    """Returns code that waits for all threads, and goes on at ``passed`` with the generation ``%reached``."""
    return f"""
  %here = load atomic i64, ptr %generation_ptr acquire, align 8
  %before = atomicrmw add ptr %arrived_ptr, i64 1 acq_rel
  %is_last = icmp eq i64 %before, %last
  br i1 %is_last, label %open, label %wait
open:
  store atomic i64 0, ptr %arrived_ptr monotonic, align 8
  %following = add i64 %here, 1
  %stopped = load i64, ptr %stop_ptr
  %is_stopped = icmp ne i64 %stopped, 0
  %next_generation = select i1 %is_stopped, i64 {_ENDS}, i64 %following
  store atomic i64 %next_generation, ptr %generation_ptr release, align 8
  br label %passed
wait:
  %waits = phi i64 [0, %each], [%waits_next, %again]
  %now = load atomic i64, ptr %generation_ptr acquire, align 8
  %is_open = icmp ne i64 %now, %here
  br i1 %is_open, label %passed, label %spin
spin:
  %waits_next = add i64 %waits, 1
  %is_long = icmp ugt i64 %waits, %spins
  br i1 %is_long, label %give, label %pause
pause:{_pause(target)}
  br label %again
give:
  %is_longer = icmp ugt i64 %waits, %most_waits
  br i1 %is_longer, label %rest, label %let
let:
  %let_ignored = call i32 %yield_ptr()
  br label %again
rest:
  %rest_ignored = call i32 %sleep_ptr(i32 {_SLEEP_US})
  br label %again
again:
  br label %wait
passed:
  %reached = phi i64 [%next_generation, %open], [%now, %wait]"""
