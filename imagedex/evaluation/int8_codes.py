"""int8 codes of vectors, and by how much a product of codes can miss the product of the vectors.

A few coordinates of an embedding are large in every picture. So a row g is coded less the mean m, and turned: R (g - m).
Vectors of at least `WIDE` numbers are first turned to the principal directions of the rows. Then signs are flipped and Hadamard
matrices of 64 rows multiply. R is orthogonal, so products stay what they are. What is large in one coordinate is shared out
over 64. The first `HEAD` directions are mixed only with each other: they are the head. With steps s for the rows and t for the
queries, and what rounding leaves,

    R (g - m) = s c + e      R q = t d + f      (c, d: whole numbers from -127 to 127)

    q · g  =  q · m  +  s t (c · d)  +  s c · f  +  e · R q

c · d is a product of int8 with int32 sums, without any error; q · m is known for each query. By Cauchy and Schwarz the last two
terms are at most

    E(q) = max |s c| |f|  +  max |e| |q|      (and what is lost where scores are rounded to float32)

Both maxima are over the rows, found when they are coded (`Int8Codes.longest`, `.error`). So a row whose q · g is at least x has

    c · d  >=  (x - q · m - E(q)) / (s t)

No row below that needs to be looked at. Nothing is assumed of the vectors: one whose e is larger than usual is a stray, which is
multiplied in float32 instead. A bias b taken off the scores is taken off c · d as the nearest multiple of s t, and half of s t is
added to E(q).

For a single query, nearly all the time is that of reading the codes from memory. So their heads are read first, a sixth of 384
numbers. With h for the head's part of a vector and r for what is behind it, by Cauchy and Schwarz again,

    q · g  <=  q · m  +  s t (c_h · d_h)  +  max |s c| |f_h|  +  max |e| |R q|_h  +  |R q|_r |R (g - m)|_r

(and rounding, as above). The last length, rounded up, is kept of each row (`Int8Codes.rest`, a byte). Where the rows have
directions that matter more than others, as embeddings do, a few rows in a hundred are left. Where they have none, there is no
head. A bias is half a step here, too.

The rows are turned in float32. Rounding g - m, rounding R and summing D products make coordinate j wrong by at most (D + 2) 2⁻²⁴
times the sum of |R|_ji |g - m|_i. R has D columns of length 1. So |e|, |s c| and the length behind the head are wrong by at most
(D + 2) √D 2⁻²⁴ |g - m|. `slack` is a little more, for rounding where the lengths are computed (of up to 4,096 numbers).
"""

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

TURNED = 64  # coordinates that one Hadamard matrix mixes
LARGEST = 127
HEAD = 64  # coordinates
WIDE = 4 * HEAD  # vectors of fewer coordinates have no head
SMALL_REST = 0.7  # of a row's length; where more is behind the head, it rules out too little
HEAD_QUERIES = 1  # at once; for more, the products take longer than the reading
SAMPLE = 2**14  # rows that say how long a step is
ROWS_AT_ONCE = 2**10
ROWS_A_PRODUCT = 2**11  # they are copied before they are multiplied, so they had better fit the cache
HEADS_A_PRODUCT = 2**14
LEAST_STEPS = 4e-9  # s t is at least so much: a bias below `BIAS` is then fewer than 2³⁰ of them
BIAS = 4.0
ROUNDED = 2.0**-22  # of a score, at most so much is lost where it, or what it is compared with, is rounded to float32
CODED_FROM = 20_000  # rows; fewer are searched sooner in float32
ASKED = 100  # coding takes as long as so many queries without codes, or fewer


@cache
def fast_products() -> bool:
    """Whether torch multiplies int8 by instructions of the processor for it (VNNI, AMX), without error. Others sum pairs in 16
    bits, which overflow, or go number by number."""
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not (hasattr(torch, "_int_mm") and has_instructions()):
        return False
    left, right = torch.full((64, 128), -127, dtype=torch.int8), torch.full((17, 128), 127, dtype=torch.int8)
    try:
        return all(bool((torch._int_mm(left, right[:n].T) == -127 * 127 * 128).all()) for n in (1, 17))
    except RuntimeError:
        return False


def pay(rows: int, asked: int) -> bool:
    """Whether codes of so many rows pay, once so many queries were asked of them."""
    return rows >= CODED_FROM and asked >= ASKED and fast_products()


def turned(vectors: torch.Tensor) -> torch.Tensor:
    """(N, D) vectors with flipped signs, times Hadamard matrices: (N, P), P the next multiple of 64."""
    blocks = -(-vectors.shape[1] // TURNED)
    padded = torch.nn.functional.pad(vectors, (0, blocks * TURNED - vectors.shape[1]))
    signs, mixing = _rotation(blocks * TURNED, vectors.dtype)
    # neighbours go to different matrices: vectors may have their large coordinates side by side
    apart = (padded * signs).view(-1, TURNED, blocks).transpose(1, 2)
    return (apart @ mixing).reshape(len(vectors), blocks * TURNED)


def directions(sample: torch.Tensor) -> torch.Tensor:
    """(D, P) the matrix of R, for rows of which these (n, D), less their mean, are a sample."""
    size = sample.shape[1]
    if size < WIDE:
        return turned(torch.eye(size, dtype=torch.float64))
    sample = sample.double().nan_to_num(posinf=0.0, neginf=0.0)
    sample = sample / sample.norm(dim=1, keepdim=True).clamp(min=1e-30)
    try:  # torch's gives up at some matrices of low rank
        principal = torch.from_numpy(np.linalg.eigh((sample.T @ sample).numpy()).eigenvectors).flip(1)
    except np.linalg.LinAlgError:  # any turn will do
        return turned(torch.eye(size, dtype=torch.float64))
    return torch.cat([turned(principal[:, :HEAD].contiguous()), turned(principal[:, HEAD:].contiguous())], dim=1)


def slack(size: int) -> float:
    """What turning vectors of `size` numbers in float32 adds to |e|, a share of their length."""
    return 1.1 * (size + 4) * size**0.5 * 2.0**-24


def float32_is_coarse() -> bool:
    """Whether float32 products have been set to be quicker and less exact, which holds on the CPU, too."""
    return torch.get_float32_matmul_precision() != "highest"


@cache
def _rotation(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(b"signs").digest(size // 8), np.uint8))
    mixing = np.ones((1, 1))
    while len(mixing) < TURNED:
        mixing = np.block([[mixing, mixing], [mixing, -mixing]])
    return torch.from_numpy(1.0 - 2.0 * bits).to(dtype), torch.from_numpy(mixing / TURNED**0.5).to(dtype)


class Int8Codes:
    """The codes of N rows.

    Args:
        read: places (n,) -> (n, D) rows, float32 or float16.
        count: N.
        bias: (N,) taken off the scores, or None.

    Attributes:
        codes: (N, P) int8. strays: places of rows that the codes say nothing of.
        error, longest: the largest |e| and |s c| of all other rows. largest_bias: none of theirs is larger.
        turn: (D, P) float64; a row less the mean, times this, is turned. rest: (N, 1) uint8 and unit, a float: a row's
            coordinates behind the head are no longer than their product, strays aside; None where there is no head.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], count: int, bias: np.ndarray | None = None):
        sample = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64))
        drawn = torch.from_numpy(read(sample)).float()
        self.mean = torch.nan_to_num(drawn.double().mean(0), posinf=0.0, neginf=0.0).float()
        drawn = drawn - self.mean
        self.turn, self.slack = directions(drawn), slack(drawn.shape[1])
        exact = torch.nan_to_num(self._turned(drawn), posinf=0.0, neginf=0.0)
        spread = exact.abs().amax(1)
        # all but one row in a thousand fit between -127 and 127 steps
        self.step = float(np.float32(max(spread.sort().values[int(0.999 * (len(spread) - 1))] / LARGEST, 1e-5)))
        size = self.turn.shape[1]
        self.codes = torch.from_numpy(
            np.empty((count, size), np.int8)
        )  # numpy asks for large pages of memory, torch does not
        lengths, rests = (part.norm(dim=1, dtype=torch.float64) for part in (exact, exact[:, HEAD:]))
        upper = (rests + self.slack * (rests + lengths)).sort().values
        self.unit = 1.25 * float(upper[int(0.999 * (len(upper) - 1))]) / 255
        say_much = drawn.shape[1] >= WIDE and self.unit > 0 and rests.median() <= SMALL_REST * lengths.median()
        self.rest = torch.empty(count, 1, dtype=torch.uint8) if say_much else None
        error, longest = torch.empty(count), torch.empty(count)
        for start in range(0, count, ROWS_AT_ONCE):
            block = slice(start, min(start + ROWS_AT_ONCE, count))
            rows = torch.from_numpy(read(np.arange(block.start, block.stop))).float()
            self.codes[block], error[block], longest[block], rest = self._coded(rows)
            if self.rest is not None:
                units = (rest / self.unit).ceil_()
                error[block].masked_fill_(~(units <= 255), torch.inf)  # so that it becomes a stray
                self.rest[block, 0] = units.nan_to_num_().clamp_(max=255).to(torch.uint8)
        usual = 1.25 * self.step * (self.codes.shape[1] / 12) ** 0.5  # rounding alone leaves step / √12 a coordinate
        stray = ~(error <= usual + 2 * self.slack * (longest + error)) | (error + longest).isinf()
        self.bias, self.largest_bias = None, 0.0
        if bias is not None:
            self.bias, self.largest_bias = torch.from_numpy(np.asarray(bias, np.float64)), BIAS
            stray |= ~(self.bias.abs() < BIAS)
        self.is_stray = stray.numpy()
        self.strays = np.flatnonzero(self.is_stray)
        self.error = float(error[~stray].max()) if len(self.strays) < count else 0.0
        self.longest = float(longest[~stray].max()) if len(self.strays) < count else 0.0

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, P) of rows (n, D), less the mean already."""
        exact = torch.float64 if float32_is_coarse() else torch.float32
        return (rows.to(exact) @ self.turn.to(exact)).float()

    def _coded(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes, and upper bounds of |e|, |s c| and of the length behind the head, of (n, D) float32 rows."""
        exact = self._turned(rows - self.mean)
        length = exact.norm(dim=1, dtype=torch.float64)
        codes = (exact / self.step).round_().clamp_(-LARGEST, LARGEST).nan_to_num_()
        steps = codes * self.step
        longest = steps.norm(dim=1, dtype=torch.float64) * (1 + self.slack)
        rest = exact[:, HEAD:].norm(dim=1, dtype=torch.float64) * (1 + self.slack) + self.slack * length
        error = exact.sub_(steps).norm(dim=1, dtype=torch.float64) * (1 + self.slack) + self.slack * length
        return codes.to(torch.int8), error, longest, rest

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def of_use(self) -> bool:
        """Few rows are strays."""
        return len(self.strays) * 50 <= len(self)


class CodedQueries:
    """Queries in codes of their own, against the codes of rows.

    Args:
        queries: (Q, D) float32, finite; one with a NaN finds nothing.
    """

    def __init__(self, codes: Int8Codes, queries: np.ndarray):
        self.rows = codes
        exact = torch.from_numpy(queries).double() @ codes.turn
        largest = exact.abs().amax(1, keepdim=True)
        if codes.bias is not None:  # the same bias is as many steps for each of them
            largest = largest.nan_to_num(0.0, posinf=0.0).amax().expand_as(largest)
        step = (largest / LARGEST).clamp(min=LEAST_STEPS / codes.step)
        self.codes = (exact / step).round().clamp(-LARGEST, LARGEST).nan_to_num().to(torch.int8)
        self.step = step[:, 0].numpy() * codes.step
        left = exact - step * self.codes
        length, mean = exact.norm(dim=1).numpy(), codes.mean.double().numpy()
        # the rounding of scores and of the floor to float32
        rounding = ROUNDED * (length * (np.linalg.norm(mean) + codes.longest + codes.error) + codes.largest_bias)
        self.error, self.head_error = (
            (codes.longest * lost.norm(dim=1).numpy() + codes.error * asked.norm(dim=1).numpy()) * (1 + 1e-9)
            + 1e-12
            + rounding
            for lost, asked in ((left, exact), (left[:, :HEAD], exact[:, :HEAD]))
        )
        self.at_mean = queries.astype(np.float64) @ mean
        if codes.rest is not None:
            # their scores are sums in float32, too
            rest = exact[:, HEAD:].norm(dim=1).numpy() * codes.unit * (1 + 1e-9)
            self.head_error = self.head_error + rounding + ROUNDED * 255 * rest
            self.rest = torch.from_numpy((rest / self.step).astype(np.float32))
        self.bias = None
        if codes.bias is not None:
            self.error, self.head_error = self.error + 0.5 * self.step, self.head_error + 0.5 * self.step
            steps = codes.bias.nan_to_num().clamp(-BIAS, BIAS) / self.step.max()
            self.bias = steps.round_().to(torch.int32)[:, None]

    def scores(self, places: np.ndarray | slice) -> torch.Tensor:
        """(n, Q) int32 of these rows."""
        rows = _taken(self.rows.codes, places)
        found = torch.empty(len(rows), len(self.codes), dtype=torch.int32)
        for start in range(0, len(rows), ROWS_A_PRODUCT):
            part = slice(start, start + ROWS_A_PRODUCT)
            torch._int_mm(rows[part], self.codes.T, out=found[part])
        return found if self.bias is None else found.sub_(_taken(self.bias, places))

    def head_scores(self, places: np.ndarray | slice) -> torch.Tensor:
        """(n, Q) float32 of these rows, from their heads alone."""
        rows = _taken(self.rows.codes[:, :HEAD], places)
        found, steps = (
            torch.empty(len(rows), len(self.codes)),
            torch.empty(HEADS_A_PRODUCT, len(self.codes), dtype=torch.int32),
        )
        for start in range(0, len(rows), HEADS_A_PRODUCT):
            part = rows[start : start + HEADS_A_PRODUCT]
            torch._int_mm(part, self.codes[:, :HEAD].T, out=steps[: len(part)])
            found[start : start + len(part)] = steps[: len(part)]
        if self.bias is not None:
            found.sub_(_taken(self.bias, places))
        return found.addcmul_(_taken(self.rows.rest, places).float(), self.rest)

    def head_least(self, floor: np.ndarray) -> torch.Tensor:
        """(Q,) float32 head scores which every row has, strays aside, whose true score is at least `floor` (Q,)."""
        steps = (floor - self.at_mean - self.head_error) / self.step
        least = np.nextafter(np.where(np.isnan(steps), np.inf, steps).astype(np.float32), np.float32(-np.inf))
        return torch.from_numpy(least)

    def least(self, floor: np.ndarray) -> torch.Tensor:
        """(Q,) int32 scores which every row has, strays aside, whose true score is at least `floor` (Q,)."""
        steps = np.floor((floor - self.at_mean - self.error) / self.step).clip(-(2**31), 2**31 - 1)
        return torch.from_numpy(np.where(np.isnan(steps), 2**31 - 1, steps).astype(np.int32))


def _taken(values: torch.Tensor, places: np.ndarray | slice) -> torch.Tensor:
    return values[places] if isinstance(places, slice) else values.index_select(0, torch.from_numpy(places))
