"""FlashAttention 4's forward kernel for Hopper, extended to read keys that peers are still sending.

The kernel walks the keys of a query tile from the last block to the first. Blocks from
``num_remote_blocks`` on are this rank's own and lie in the layer's inputs; the blocks before them
lie in a second pair of arrays, into which peers put their rows, farthest peer first. Before its
first load from the rows of a peer the producer warp spins on that peer's flag for the head at hand,
then fences, because the loads go through another path of the memory (TMA) than the flag.

Where a kernel of few blocks puts this rank's own rows meanwhile, it is launched with programmatic
stream serialization: as soon as those blocks have started, so that it cannot keep them out.

It overrides what loads keys and values, and lets warp groups without rows pass by the products:
tiles, masks, softmax and stores are the package's. The last block to have read all gives the slots
back. Everything that a layer decides is a run-time argument, in ``AuxData.scalars``.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import cutlass
import torch
from cutlass import Int32, Int64, const_expr, cute, pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import T, dsl_user_op
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.cute_dsl_utils import to_cute_tensor
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.interface import _tile_size_fwd_sm90
from flash_attn.cute.named_barrier import NamedBarrierFwd
from flash_attn.cute.utils import AuxData
from quack import copy_utils
from torch import Tensor

from .fused import CHUNK_BITS, RemoteKeys

# What the kernel is told of `RemoteKeys` at run time, in this order; tensors by their addresses.
SCALARS = {
    "k": Int64,
    "v": Int64,
    "num_remote_blocks": Int32,
    "num_keys": Int32,
    "begins": Int64,
    "flags": Int64,
    "counter": Int64,
    "clears": Int64,
    "num_clears": Int32,
    "frees": Int64,
    "num_frees": Int32,
    "note": Int64,
    "deadline_ns": Int64,
    "behind_puts": Int32,
}

_KERNEL_PARAMETERS = (
    "self mQ mK mV mO mLSE mCuSeqlensQ mCuSeqlensK mSeqUsedQ mSeqUsedK mPageTable tma_atom_Q "
    "tma_atom_K tma_atom_V tma_atom_O softmax_scale_log2 softmax_scale window_size_left "
    "window_size_right learnable_sink blocksparse_tensors sQ_layout sK_layout sV_layout sO_layout "
    "sP_layout gmem_tiled_copy_Q gmem_tiled_copy_K gmem_tiled_copy_V gmem_tiled_copy_O "
    "tiled_mma_qk tiled_mma_pv tile_sched_params TileScheduler SharedStorage aux_data fastdiv_mods"
)
_LOAD_PARAMETERS = (
    "self mQ mK mV sQ sK sV tma_atom_Q tma_atom_K tma_atom_V pipeline_k pipeline_v pipeline_q "
    "gmem_tiled_copy_Q mPageTable blocksparse_tensors block_info SeqlenInfoCls TileSchedulerCls"
)
_MMA_PARAMETERS = (
    "self tiled_mma_qk tiled_mma_pv mO mLSE sQ sK sVt sP sO learnable_sink pipeline_k pipeline_v "
    "pipeline_q gmem_tiled_copy_O tma_atom_O tidx softmax_scale_log2 softmax_scale block_info "
    "SeqlenInfoCls AttentionMaskCls TileSchedulerCls blocksparse_tensors aux_data fastdiv_mods"
)
_LOAD_KV_PARAMETERS = (
    "self tma_load_fn paged_kv_manager sX block pipeline_kv producer_state K_or_V page_idx"
)
_CLASSES = ("TileScheduler", "SharedStorage")  # which the compiler takes one by one
_UNUSED = (None,) * 9  # variable lengths, pages, windows, sinks, sparsity
_cache = get_jit_cache("swiftfusion_xdit")
_body = cute.jit(FlashAttentionForwardSm90.kernel.__wrapped__)


def unknown_signature() -> str:
    """What of the package is not as this module knows it, or nothing."""
    for name, wanted in (
        ("kernel", _KERNEL_PARAMETERS),
        ("load", _LOAD_PARAMETERS),
        ("load_KV", _LOAD_KV_PARAMETERS),
        ("mma", _MMA_PARAMETERS),
    ):
        found = " ".join(inspect.signature(getattr(FlashAttentionForwardSm90, name)).parameters)
        if found != wanted:
            return f"FlashAttentionForwardSm90.{name} takes {found}"
    return ""


@dsl_user_op
def _load_i32(address: Int64, *, loc: Any = None, ip: Any = None) -> Int32:
    return Int32(_asm("ld.global.u32 $0, [$1];", "=r,l", T.i32(), [address], loc, ip))


@dsl_user_op
def _load_i64(address: Int64, *, loc: Any = None, ip: Any = None) -> Int64:
    return Int64(_asm("ld.global.u64 $0, [$1];", "=l,l", T.i64(), [address], loc, ip))


@dsl_user_op
def _await_flag(
    flag: Int64, name: Int64, note: Int64, deadline_ns: Int64, *, loc: Any = None, ip: Any = None
) -> None:
    """Spin until the flag is set. Past the deadline: note its name and stop the GPU's work."""
    text = """{
        .reg .pred p;
        .reg .u32 seen;
        .reg .u64 start, now;
        ld.acquire.sys.global.u32 seen, [$0];
        setp.ne.u32 p, seen, 0;
        @p bra ARRIVED;
        mov.u64 start, %globaltimer;
    AGAIN:
        nanosleep.u32 40;
        ld.acquire.sys.global.u32 seen, [$0];
        setp.ne.u32 p, seen, 0;
        @p bra ARRIVED;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, start;
        setp.lt.u64 p, now, $3;
        @p bra AGAIN;
        cvt.u32.u64 seen, $1;
        st.release.sys.global.u32 [$2], seen;
        trap;
    ARRIVED:
    }"""
    _asm(text, "l,l,l,l", None, [flag, name, note, deadline_ns], loc, ip)


@dsl_user_op
def _give_back(
    counter: Int64,
    clears: Int64,
    num_clears: Int64,
    frees: Int64,
    num_frees: Int64,
    *,
    loc: Any = None,
    ip: Any = None,
) -> None:
    """Count this block; the last one clears flags and sets others, for whoever waits for them."""
    text = """{
        .reg .pred p;
        .reg .u32 seen, last, y;
        .reg .u64 at, end, flag;
        atom.add.acq_rel.gpu.global.u32 seen, [$0], 1;
        mov.u32 last, %nctaid.x;
        mov.u32 y, %nctaid.y;
        mul.lo.u32 last, last, y;
        mov.u32 y, %nctaid.z;
        mul.lo.u32 last, last, y;
        sub.u32 last, last, 1;
        setp.ne.u32 p, seen, last;
        @p bra DONE;
        st.relaxed.gpu.global.u32 [$0], 0;
        mov.u64 at, $1;
        mad.lo.u64 end, $2, 8, at;
    CLEAR:
        setp.ge.u64 p, at, end;
        @p bra CLEARED;
        ld.global.u64 flag, [at];
        st.relaxed.sys.global.u32 [flag], 0;
        add.u64 at, at, 8;
        bra CLEAR;
    CLEARED:
        mov.u64 at, $3;
        mad.lo.u64 end, $4, 8, at;
    FREE:
        setp.ge.u64 p, at, end;
        @p bra DONE;
        ld.global.u64 flag, [at];
        st.release.sys.global.u32 [flag], 1;
        add.u64 at, at, 8;
        bra FREE;
    DONE:
    }"""
    operands = [counter, clears, num_clears, frees, num_frees]
    _asm(text, "l,l,l,l,l", None, operands, loc, ip)


def _asm(text: str, constraints: str, result: Any, operands: list, loc: Any, ip: Any) -> Any:
    return llvm.inline_asm(
        result,
        [Int64(operand).ir_value(loc=loc, ip=ip) for operand in operands],
        text,
        constraints,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


class _StartsEarly:
    """A kernel to launch, perhaps before the one in front of it has ended."""

    def __init__(self, kernel: Any, behind_puts: Int32) -> None:
        self._kernel, self._behind_puts = kernel, behind_puts

    def launch(self, **how: Any) -> Any:
        return self._kernel.launch(use_pdl=self._behind_puts, **how)


class FusedForwardSm90(FlashAttentionForwardSm90):
    """The kernel; one compilation serves all lengths, strides, peers and layers."""

    def kernel(self, *args: Any) -> Any:
        """Stands where the package's ``__call__`` expects its kernel: adds the second arrays."""
        given = dict(zip(_KERNEL_PARAMETERS.split()[1:], args, strict=True))
        told = dict(zip(SCALARS, given["aux_data"].scalars, strict=True))
        second: list[Any] = []
        for name, address, layout, columns in (
            ("mK", told["k"], self.sK_layout, self.tile_hdim),
            ("mV", told["v"], self.sV_layout, self.tile_hdimv),
        ):
            mX = given[name]
            num_rows, num_heads = told["num_remote_blocks"] * self.tile_n, cute.size(mX.shape[2])
            row = cute.assume(Int64(num_heads) * columns, divby=columns)
            sample = cute.assume(Int64(num_rows) * row, divby=columns)
            remote = cute.make_tensor(
                cute.make_ptr(self.dtype, address, cute.AddressSpace.gmem, assumed_align=16),
                cute.make_layout(
                    (num_rows, columns, num_heads, cute.size(mX.shape[3])),
                    stride=(row, 1, columns, sample),
                ),
            )
            second += cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(),
                remote,
                cute.select(layout, mode=[0, 1]),
                (self.tile_n, columns),
                1,
            )
            # Masks and the walk go by the number of keys, loads by their block.
            given[name] = cute.make_tensor(
                mX.iterator, cute.make_layout((told["num_keys"], *mX.shape[1:]), stride=mX.stride)
            )
        classes = [given.pop(name) for name in _CLASSES]
        kernel = self.fused_kernel(tuple(given.values()), tuple(second), *classes)
        return _StartsEarly(kernel, told["behind_puts"])

    @cute.kernel
    def fused_kernel(
        self, given, second, TileScheduler: cutlass.Constexpr, SharedStorage: cutlass.Constexpr
    ):
        names = [name for name in _KERNEL_PARAMETERS.split()[1:] if name not in _CLASSES]
        arguments = dict(zip(names, given, strict=True))
        arguments |= dict(zip(_CLASSES, (TileScheduler, SharedStorage), strict=True))
        self.told = dict(zip(SCALARS, arguments["aux_data"].scalars, strict=True))
        self.remote = {"K": second[:2], "V": second[2:]}
        _body(self, **arguments)

    def load(self, *args: Any) -> None:
        """As the package's; a block of threads has one tile, so its remote operands are known."""
        given = dict(zip(_LOAD_PARAMETERS.split()[1:], args, strict=True))
        _, head, sample, _ = given["TileSchedulerCls"]().initial_work_tile_info().tile_idx
        self.kv_head = head if const_expr(self.pack_gqa) else head // self.qhead_per_kvhead
        self.num_kv_heads = cute.size(given["mK"].shape[2])
        self.load_remote = {}
        for name, columns in (("K", self.tile_hdim), ("V", self.tile_hdimv)):
            atom, tensor = self.remote[name]
            tiles = cute.local_tile(
                tensor[None, None, self.kv_head, sample], (self.tile_n, columns), (None, 0)
            )
            copy, _, _ = copy_utils.tma_get_copy_fn(
                atom, 0, cute.make_layout(1), tiles, given[f"s{name}"]
            )
            self.load_remote[name] = copy_utils.tma_producer_copy_fn(
                copy, given[f"pipeline_{name.lower()}"]
            )
        FlashAttentionForwardSm90.load(self, *args)
        self.give_back()

    @cute.jit
    def give_back(self):
        """Once this block's last keys and values have been read: `load` ends with a wait for it.

        Nor does this kernel end before the puts that it may have started beside.
        """
        cute.arch.griddepcontrol_wait()
        thread, _, _ = cute.arch.thread_idx()
        if thread == 0:  # of the warp that loads
            told = self.told
            _give_back(
                told["counter"],
                told["clears"],
                Int64(told["num_clears"]),
                told["frees"],
                Int64(told["num_frees"]),
            )

    @cute.jit
    def load_KV(
        self,
        tma_load_fn,
        paged_kv_manager,
        sX,
        block,
        pipeline_kv,
        producer_state,
        K_or_V,
        page_idx=None,
    ):
        load_remote = self.load_remote[K_or_V]
        own = block - self.told["num_remote_blocks"]
        if own >= 0:
            tma_load_fn(src_idx=own, producer_state=producer_state)
        else:
            if const_expr(K_or_V == "K"):  # the values of a block follow its keys
                self.await_chunks(block)
            load_remote(src_idx=block, producer_state=producer_state)
        pipeline_kv.producer_commit(producer_state)

    @cute.jit
    def await_chunks(self, block):
        """Wait for the chunks that the walk meets first in this block."""
        entry = _load_i32(self.told["begins"] + Int64(block) * 4)
        if entry != 0:
            first = entry & ((1 << CHUNK_BITS) - 1)
            for i in cutlass.range(entry >> CHUNK_BITS, unroll=1):
                number = (first + i) * self.num_kv_heads + self.kv_head
                at = self.told["flags"] + Int64(number) * 16
                flag, name = _load_i64(at), _load_i64(at + 8)
                _await_flag(flag, name, self.told["note"], self.told["deadline_ns"])
            cute.arch.fence_proxy("async.global")

    @cute.jit
    def mma(self, *args):
        """As the package's; a warp group whose rows all lie past the last one multiplies none.

        The last tile of a head is rarely full, and takes as long as a full one otherwise.
        """
        given = dict(zip(_MMA_PARAMETERS.split()[1:], args, strict=True))
        if const_expr(not (self.use_tma_O and self.intra_wg_overlap)):  # other barriers, all needed
            FlashAttentionForwardSm90.mma(self, *args)
        else:
            m_block, _, sample, _ = given["TileSchedulerCls"]().initial_work_tile_info().tile_idx
            seqlen = given["SeqlenInfoCls"](sample)
            group = cute.arch.make_warp_uniform(given["tidx"] // self.num_threads_per_warp_group)
            first_row = m_block * self.tile_m + group * (self.tile_m // self.num_wg_mma)
            # Query heads that share keys lie in rows of their own.
            packed = self.qhead_per_kvhead if const_expr(self.pack_gqa) else 1
            if first_row < seqlen.seqlen_q * packed:
                FlashAttentionForwardSm90.mma(self, *args)
            else:
                _, num_blocks = given["block_info"].get_n_block_min_max(seqlen, m_block)
                self.follow(given["pipeline_k"], given["pipeline_v"], num_blocks)

    @cute.jit
    def follow(self, pipeline_k, pipeline_v, num_blocks):
        """Pass the barriers of `mma` in its order, for the other warp groups and the producer."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.num_stages)
        pipeline_k.consumer_wait(state, pipeline_k.consumer_try_wait(state))
        pipeline_k.consumer_release(state)
        for _ in cutlass.range(num_blocks - 1, unroll=1):
            state = self.follow_one_block(pipeline_k, pipeline_v, state)
        pipeline_v.consumer_wait(state, pipeline_v.consumer_try_wait(state))
        pipeline_v.consumer_release(state)
        threads, barrier = self.num_epilogue_threads, int(NamedBarrierFwd.Epilogue)
        cute.arch.barrier(barrier_id=barrier, number_of_threads=threads)
        cute.arch.barrier_arrive(
            barrier_id=barrier, number_of_threads=threads + cute.arch.WARP_SIZE
        )

    @cute.jit
    def follow_one_block(self, pipeline_k, pipeline_v, state):
        values = state.clone()
        state.advance()
        pipeline_k.consumer_wait(state, pipeline_k.consumer_try_wait(state))
        self.warp_scheduler_barrier_sync()
        pipeline_v.consumer_wait(values, pipeline_v.consumer_try_wait(values))
        self.warp_scheduler_barrier_arrive()
        pipeline_k.consumer_release(state)
        pipeline_v.consumer_release(values)
        return state


def tile_of(head_dim: int) -> Any:
    """The package's choice of tiles: ``m_block_size``, ``n_block_size`` and how it multiplies."""
    return _tile_size_fwd_sm90(head_dim, head_dim, False, False)


def kernel_for(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
    """The kernel for tensors of this dtype, head dim and number of query heads a kv head.

    In the package's own cache, which outlives the process where its user has switched that on.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = (source, CHUNK_BITS, str(q.dtype), q.shape[3], q.shape[2] // k.shape[2])
    if key not in _cache:
        _cache[key] = compile_kernel(q, k, v, out)
    return _cache[key]


def compile_kernel(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
    """As :func:`kernel_for`, anew."""
    head_dim, shared_by = q.shape[3], q.shape[2] // k.shape[2]
    tile = tile_of(head_dim)
    kernel = FusedForwardSm90(
        {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}[q.dtype],
        head_dim,
        head_dim,
        shared_by,
        is_causal=False,
        is_local=False,
        pack_gqa=shared_by > 1,
        tile_m=tile.m_block_size,
        tile_n=tile.n_block_size,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=tile.intra_wg_overlap,
        mma_pv_is_rs=tile.mma_pv_is_rs,
    )
    tensors = [to_cute_tensor(x) for x in (q, k, v, out)]
    scalars = tuple(kind(0) for kind in SCALARS.values())
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(
        kernel,
        *tensors,
        None,  # no log-sum-exp
        0.1,
        *_UNUSED,
        AuxData(None, scalars),
        None,
        None,
        stream,
        options="--enable-tvm-ffi",
    )


def arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, remote: RemoteKeys
) -> tuple[Any, ...]:
    """What the compiled kernel is called with."""
    scalars = (
        remote.k,
        remote.v,
        len(remote.begins),
        remote.num_keys,
        remote.begins.data_ptr(),
        remote.flags.data_ptr(),
        remote.counter.data_ptr(),
        remote.clears.data_ptr(),
        len(remote.clears),
        remote.frees.data_ptr(),
        len(remote.frees),
        remote.note,
        remote.deadline_ns,
        int(remote.behind_puts),
    )
    return (q, k, v, out, None, scale, *_UNUSED, AuxData(None, scalars), None, None)
