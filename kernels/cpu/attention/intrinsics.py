"""Functions for compiled code that Numba itself cannot express.

The type of ``zero``, the last argument, tells what the cache stores and how it is multiplied: see
:mod:`kernels.cpu.attention.vectors`. Addresses, strides and counts are 64-bit integers.
"""

# mypy: disallow-untyped-decorators=False

from numba import types
from numba.extending import intrinsic

from kernels.cpu.attention import vectors
from kernels.cpu.attention.lanes import FLOAT, INT32, INT64, PAIRED, ROW_COUNTS, WIDENED, number_bytes, widen


@intrinsic
def product(context, a, a_stride, b, c, c_stride, num_words, num_rows, zero):  # type: ignore[no-untyped-def]
    """Multiplies matrices of words: see :func:`kernels.cpu.attention.vectors.emit_product`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for count in ROW_COUNTS:
            with builder.if_then(builder.icmp_signed("==", args[6], INT64(count))):
                vectors.emit_product(builder, args[:6], count, zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, zero), generate


@intrinsic
def pack_keys(context, keys, slots, row_bytes, num_words, to, zero):  # type: ignore[no-untyped-def]
    """Packs keys: see :func:`kernels.cpu.attention.vectors.emit_pack_keys`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_pack_keys(builder, args[:5], zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, zero), generate


@intrinsic
def pack_values(context, first, second, head_dim, stride, to, zero):  # type: ignore[no-untyped-def]
    """Packs values: see :func:`kernels.cpu.attention.vectors.emit_pack_values`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_pack_values(builder, args[:5], zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, zero), generate


@intrinsic
def softmax(context, scores, num_panels, factor, stats, zero):  # type: ignore[no-untyped-def]
    """Computes a row's weights: see :func:`kernels.cpu.attention.vectors.emit_softmax`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_softmax(builder, args[:4], zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, zero), generate


@intrinsic
def prefetch(context, rows, slots, num_tokens, row_bytes):  # type: ignore[no-untyped-def]
    """Prefetches rows: see :func:`kernels.cpu.attention.vectors.emit_prefetch`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_prefetch(builder, args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def item_bytes(context, zero):  # type: ignore[no-untyped-def]
    """Returns the bytes of a stored number."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return INT64(number_bytes(zero))

    return types.int64(zero), generate


@intrinsic
def words_in(context, numbers, zero):  # type: ignore[no-untyped-def]
    """Returns the number of words that so many numbers fill."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ashr(builder.add(args[0], INT64(1)), INT64(1)) if zero == PAIRED else args[0]

    return types.int64(types.int64, zero), generate


@intrinsic
def pointer(context, address, zero):  # type: ignore[no-untyped-def]
    """Casts an address to a pointer to numbers of the type of ``zero``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(zero)(types.int64, zero), generate


@intrinsic
def take_ticket(context, address):  # type: ignore[no-untyped-def]
    """Adds one to the integer at an address, atomically, and returns its old value."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, INT64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def load_word(context, address, index, zero):  # type: ignore[no-untyped-def]
    """Loads the word at an index of stored numbers, as a float32."""
    item = types.uint16 if zero == WIDENED else types.float32

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(item)))
        loaded = builder.load(builder.gep(pointer, [args[1]]), align=2)
        return widen(builder, loaded, FLOAT) if zero == WIDENED else loaded

    return types.float32(types.int64, types.int64, zero), generate


@intrinsic
def write_output(context, sums, mass, head_dim, to, zero):  # type: ignore[no-untyped-def]
    """Writes a row's result: see :func:`kernels.cpu.attention.vectors.emit_output`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_output(builder, args[:4], zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64, zero), generate


@intrinsic
def power_of_two(context, exponent):  # type: ignore[no-untyped-def]
    """Returns 2 to a whole float32 of [-127, 127], built from its bits; -127 gives 0."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        biased = builder.add(builder.fptosi(args[0], INT32), INT32(127))
        return builder.bitcast(builder.shl(biased, INT32(23)), FLOAT)

    return types.float32(types.float32), generate
