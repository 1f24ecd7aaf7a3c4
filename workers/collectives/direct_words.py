"""What :mod:`workers.collectives.direct_code` works with: the places of 64-bit words in memory that Python sets up."""

OK, GAVE_UP, BROKEN, CLOSED, NOT_DUE, DAMAGED = range(6)
"""How an exchange ended: as it should; ``on_wait`` had it end; a connection broke, or was closed by the peer; a frame
came that was not due, or that is damaged."""

HEAD_STRIDE = 64
"""Bytes from one header that is sent to the next."""

# Words of the state of the ranks: how the last exchange ended; which peer it waited for, by its place; and what more
# there is to say: errno of a broken connection, the number in the sum of a frame that is not due or damaged, and AT of
# one that is not due, where it begins; the number of peers, and the epoch; addresses of on_wait (int32 of int64
# milliseconds), of the code that folds checksums, and of what they are by byte; of arrays: words of each PEER, a struct
# pollfd for each, an address for each part in the order of ranks.
STATUS, AWAITED, ERROR, AT, NUM_PEERS, EPOCH, ON_WAIT, FOLD, TABLE, PEERS, POLLS, PARTS = range(12)
STATE_WORDS = 12
# Words of a peer: its socket; the frames sent to it and received from it before this sum; addresses of the headers that
# it is sent, a cache line each, of a struct msghdr, of that message's struct iovec, and of where its frames go, header
# and payload each; and how many bytes of all frames are done of both ways.
SOCKET, NUM_SENT, NUM_RECEIVED, HEADS, MESSAGE, PIECES, FRAMES, SENT, RECEIVED = range(9)
PEER_WORDS = 9
# Words of a job: the address of a counter that is 0 at first, since one thread does it, and of the state; where the
# tensor's first row begins, how many rows there are, and bytes from row to row; which strip of how many the job is of,
# and bytes of each in a row; the code that adds so many numbers; the rank's own place among the parts; and bytes from
# one frame that comes to the next.
TICKET, THE_STATE, X, ROWS, STRIDE, STRIP, NUM_STRIPS, ROW_BYTES, ADD, COUNT, MINE, FRAME_STRIDE = range(12)
JOB_WORDS = 12
