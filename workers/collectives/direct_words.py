"""The layout of the memory that :mod:`workers.collectives.direct_code` reads and writes: indices of 64-bit words."""

OK, GAVE_UP, BROKEN, CLOSED, NOT_DUE, DAMAGED = range(6)
"""The status of an all-reduce: it succeeded; ``on_wait`` ended it; a connection broke, or was closed by the peer; a
frame came that was not due, or one that is damaged."""

HEAD_STRIDE = 64
"""The distance in bytes between headers that are sent."""

# Words of the shared state:
#   STATUS     how the last all-reduce ended
#   AWAITED    the peer that it waited for, by index
#   ERROR      errno of a broken connection, or the tile of a frame that is not due or damaged
#   AT         where a frame that is not due begins, relative to the peer's frames
#   NUM_PEERS  the number of peers
#   EPOCH      the replica's epoch
#   ON_WAIT    the address of the function that decides whether to wait on: int32 of int64 milliseconds
#   FOLD       the address of the code that folds checksums
#   TABLE      the address of the table of checksums by byte
#   PEERS      the address of the words of all peers
#   POLLS      the address of a struct pollfd for each peer
#   PARTS      the address of an address for each rank's part of the sum, in rank order
STATUS, AWAITED, ERROR, AT, NUM_PEERS, EPOCH, ON_WAIT, FOLD, TABLE, PEERS, POLLS, PARTS = range(12)
STATE_WORDS = 12
# Words of a peer:
#   SOCKET        its socket
#   NUM_SENT      frames sent to it before this all-reduce
#   NUM_RECEIVED  frames received from it before this all-reduce
#   HEADS         the address of the headers that it is sent, a cache line each
#   MESSAGE       the address of a struct msghdr
#   IOVECS        the address of that message's struct iovec array
#   FRAMES        the address of memory for its frames, header and payload each
#   SENT          bytes of all frames that are sent
#   RECEIVED      bytes of all frames that are received
SOCKET, NUM_SENT, NUM_RECEIVED, HEADS, MESSAGE, IOVECS, FRAMES, SENT, RECEIVED = range(9)
PEER_WORDS = 9
# Words of one call's arguments:
#   TICKET        the address of a counter that is 0 at first; the thread that takes it first does everything
#   STATE         the address of the shared state
#   TENSOR        the address of the tensor's first row
#   ROWS          the number of rows
#   STRIDE        bytes from row to row
#   TILE          which column tile the call is for
#   NUM_TILES     how many column tiles there are
#   ROW_BYTES     bytes of a tile in a row
#   ADD           the address of the code that adds the parts
#   COUNT         how many numbers it adds
#   OWN_PART      the place of this rank's own part among all parts
#   FRAME_STRIDE  bytes from one received frame to the next
TICKET, STATE, TENSOR, ROWS, STRIDE, TILE, NUM_TILES, ROW_BYTES, ADD, COUNT, OWN_PART, FRAME_STRIDE = range(12)
ARGUMENT_WORDS = 12
