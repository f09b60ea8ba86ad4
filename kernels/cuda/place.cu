/* place.cu - weights on their way to the GPU.
 *
 * The bus reads pinned memory only; given any other, the driver copies it first, on one core.
 * Here the context's threads do so, into a ring of pinned buffers: while they fill one, the bus
 * empties those before it. What is slowest sets the pace: the disk, page faults of a mapping, or
 * the bus. Codes and scales arrive in the file's order in scratch memory, a chunk at a time, and a
 * kernel moves them into tiles; that takes a fiftieth of the time of the transfer. */
#include <stdlib.h>
#include <string.h>

#include "place.cuh"

enum { BUFFERS = 8, BUFFER_BYTES = 4 << 20, COPY_BYTES = 128 << 10, LINE = 64, ALIGNMENT = 256 };

struct gn_cuda_upload {
    char *buffers[BUFFERS];    /* pinned */
    cudaEvent_t sent[BUFFERS]; /* the last copy out of it is done */
    int current;
    size_t used; /* bytes of the current buffer */
    void *scratch;
    size_t scratch_bytes;
};

/* ---- uploading ---- */

gn_status gn_cuda_upload_open(struct gn_cuda *cuda) {
    struct gn_cuda_upload *upload = (struct gn_cuda_upload *)calloc(1, sizeof *upload);
    if (!upload) return GN_ENOMEM;
    cuda->upload = upload;
    gn_status status = GN_OK;
    for (int i = 0; i < BUFFERS && !status; i++) {
        status = gn_cuda_status(cudaMallocHost((void **)&upload->buffers[i], BUFFER_BYTES));
        if (!status)
            status =
                gn_cuda_status(cudaEventCreateWithFlags(&upload->sent[i], cudaEventDisableTiming));
    }
    if (status) gn_cuda_upload_close(cuda);
    return status;
}

void gn_cuda_upload_close(struct gn_cuda *cuda) {
    struct gn_cuda_upload *upload = cuda->upload;
    if (!upload) return;
    for (int i = 0; i < BUFFERS; i++) {
        if (upload->sent[i]) (void)cudaEventDestroy(upload->sent[i]);
        (void)cudaFreeHost(upload->buffers[i]);
    }
    (void)cudaFree(upload->scratch);
    free(upload);
    cuda->upload = NULL;
}

typedef struct copy {
    char *dst;
    const char *src;
    size_t bytes;
} copy;

static void copy_piece(void *arg, int64_t i) {
    const copy *c = (const copy *)arg;
    const size_t at = (size_t)i * COPY_BYTES, left = c->bytes - at;
    memcpy(c->dst + at, c->src + at, left < COPY_BYTES ? left : (size_t)COPY_BYTES);
}

/* As much as the current buffer has room for; *sent says how much that was. */
static gn_status send(gn_ctx *ctx, char *dst, const char *src, size_t bytes, size_t *sent) {
    struct gn_cuda_upload *upload = ctx->cuda->upload;
    if (upload->used == BUFFER_BYTES) {
        const int next = (upload->current + 1) % BUFFERS;
        const gn_status status = gn_cuda_status(cudaEventSynchronize(upload->sent[next]));
        if (status) return status;
        upload->current = next;
        upload->used = 0;
    }
    const size_t room = BUFFER_BYTES - upload->used, n = bytes < room ? bytes : room;
    copy c = {upload->buffers[upload->current] + upload->used, src, n};
    gn_ctx_for(ctx, (int64_t)((n + COPY_BYTES - 1) / COPY_BYTES), copy_piece, &c);
    upload->used += (n + LINE - 1) / LINE * LINE;
    *sent = n;
    const cudaStream_t stream = gn_cuda_stream(ctx);
    const gn_status status =
        gn_cuda_status(cudaMemcpyAsync(dst, c.dst, n, cudaMemcpyHostToDevice, stream));
    return status ? status : gn_cuda_status(cudaEventRecord(upload->sent[upload->current], stream));
}

gn_status gn_cuda_upload(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    gn_status status = GN_OK;
    for (size_t at = 0, sent = 0; at < bytes && !status; at += sent)
        status = send(ctx, (char *)dst + at, (const char *)src + at, bytes - at, &sent);
    return status;
}

gn_status gn_cuda_scratch(gn_ctx *ctx, void **scratch, size_t bytes) {
    struct gn_cuda_upload *upload = ctx->cuda->upload;
    if (bytes > upload->scratch_bytes) {
        gn_cuda_upload_trim(ctx->cuda);
        gn_status status = gn_cuda_status(cudaSetDevice(ctx->cuda->device));
        if (!status) status = gn_cuda_status(cudaMalloc(&upload->scratch, bytes));
        if (status) {
            (void)cudaGetLastError(); /* a failed allocation is reported here and nowhere else */
            upload->scratch = NULL;
            return status;
        }
        upload->scratch_bytes = bytes;
    }
    *scratch = upload->scratch;
    return GN_OK;
}

void gn_cuda_upload_trim(struct gn_cuda *cuda) {
    struct gn_cuda_upload *upload = cuda->upload;
    if (!upload->scratch) return;
    (void)cudaStreamSynchronize(cuda->stream);
    (void)cudaFree(upload->scratch);
    upload->scratch = NULL;
    upload->scratch_bytes = 0;
}

/* ---- placing ---- */

/* The next piece of `memory`; NULL while only measuring. */
static char *piece(char *memory, size_t *total, size_t bytes) {
    char *at = memory ? memory + *total : NULL;
    *total += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

size_t gn_cuda_lay_out(gn_matrix *m, bool nested, void *memory) {
    const bool is_4bit = gn_qtype_is_4bit(m->qtype);
    const size_t numel = (size_t)(m->rows * m->cols);
    const size_t blocks = is_4bit ? (size_t)gn_cuda_blocks_of(m).padded : 0;
    const size_t nested_blocks = (blocks + GN_NESTED_BLOCK - 1) / GN_NESTED_BLOCK;
    char *base = (char *)memory;
    size_t total = 0;
    m->code = m->absmax = m->nested_code = m->nested_absmax = NULL;
    m->absmax_u8 = NULL;
    if (!is_4bit)
        m->data =
            piece(base, &total, m->qtype == GN_Q_NONE ? numel * gn_dtype_size(m->dtype) : numel);
    if (m->qtype == GN_Q_INT8)
        m->absmax = (float *)piece(base, &total, (size_t)m->rows * sizeof(float));
    if (!is_4bit) return total;
    m->data = piece(base, &total, blocks * (GN_BLOCK / 2));
    if (nested) {
        m->absmax_u8 = (uint8_t *)piece(base, &total, blocks);
        m->nested_absmax = (float *)piece(base, &total, nested_blocks * sizeof(float));
        m->nested_code = (float *)piece(base, &total, 256 * sizeof(float));
    } else {
        m->absmax = (float *)piece(base, &total, blocks * sizeof(float));
    }
    m->code = (float *)piece(base, &total, 16 * sizeof(float));
    return total;
}

/* Rows of `per_row` blocks, a block being N elements of T, into tiles: dst[i], for i below n, in
 * the tiles' order. Those of a row that src lacks are zero. */
template <typename T, int N>
static __global__ __launch_bounds__(256) void tile_kernel(T *dst, const T *src, int64_t rows,
                                                          uint32_t per_row, int64_t n) {
    pdl_wait();
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const uint32_t tile = (uint32_t)(i / (GN_CUDA_TILE_ROWS * N));
        const int within = (int)(i % (GN_CUDA_TILE_ROWS * N));
        const int64_t row = (int64_t)(tile / per_row) * GN_CUDA_TILE_ROWS + within / N;
        const int64_t block = row * per_row + tile % per_row;
        dst[i] = row < rows ? src[block * N + within % N] : T();
    }
}

/* An array of the host's, N elements of T a block, to `dst` in tiles. */
template <typename T, int N>
static gn_status place_tiles(gn_ctx *ctx, const void *dst, const void *src, gn_cuda_blocks b) {
    const int64_t row_elements = b.per_row * N;
    const size_t row_bytes = (size_t)row_elements * sizeof(T);
    const int64_t fit = (int64_t)(GN_CUDA_CHUNK / row_bytes) / GN_CUDA_TILE_ROWS;
    const int64_t step = (fit > 0 ? fit : 1) * GN_CUDA_TILE_ROWS;
    void *chunk;
    gn_status status = gn_cuda_scratch(ctx, &chunk, (size_t)step * row_bytes);
    for (int64_t row = 0; row < b.rows && !status; row += step) {
        const int64_t rows = b.rows - row < step ? b.rows - row : step;
        const int64_t n =
            (rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS * GN_CUDA_TILE_ROWS * row_elements;
        const int64_t blocks = (n + 255) / 256, most = (int64_t)ctx->cuda->sms * 8;
        status = gn_cuda_upload(ctx, chunk, (const char *)src + (size_t)row * row_bytes,
                                (size_t)rows * row_bytes);
        if (!status)
            status = launch(ctx, tile_kernel<T, N>, (unsigned)(blocks < most ? blocks : most), 256,
                            0, (T *)dst + row * row_elements, (const T *)chunk, rows,
                            (uint32_t)b.per_row, n);
    }
    return status;
}

static gn_status place_scales(gn_ctx *ctx, const gn_matrix *m, const gn_matrix *host,
                              gn_quant_sizes sizes) {
    const bool tiled = gn_cuda_is_tiled(m);
    const gn_cuda_blocks b = gn_cuda_blocks_of(m);
    if (!m->absmax_u8)
        return tiled ? place_tiles<float, 1>(ctx, m->absmax, host->absmax, b)
                     : gn_cuda_upload(ctx, (void *)m->absmax, host->absmax, sizes.absmax);
    gn_status status =
        tiled ? place_tiles<uint8_t, 1>(ctx, m->absmax_u8, host->absmax_u8, b)
              : gn_cuda_upload(ctx, (void *)m->absmax_u8, host->absmax_u8, sizes.absmax_u8);
    char *nested = (char *)m->nested_absmax;
    const size_t used = sizes.nested_absmax;
    const size_t all = (size_t)((b.padded + GN_NESTED_BLOCK - 1) / GN_NESTED_BLOCK) * sizeof(float);
    if (!status) status = gn_cuda_upload(ctx, nested, host->nested_absmax, used);
    if (!status && all > used) /* those of rows that only fill the last tiles */
        status = gn_cuda_status(cudaMemsetAsync(nested + used, 0, all - used, gn_cuda_stream(ctx)));
    if (status) return status;
    return gn_cuda_upload(ctx, (void *)m->nested_code, host->nested_code, 256 * sizeof(float));
}

static bool is_nested(const gn_matrix *m) {
    return gn_qtype_is_4bit(m->qtype) && m->absmax_u8;
}

size_t gn_cuda_place_bytes(const gn_ctx *ctx, const gn_matrix *host) {
    (void)ctx;
    gn_matrix m = *host;
    return gn_cuda_lay_out(&m, is_nested(host), NULL);
}

gn_status gn_cuda_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory) {
    gn_matrix m = *host;
    gn_cuda_lay_out(&m, is_nested(host), memory);
    const gn_quant_sizes sizes = gn_quant_sizes_of(m.qtype, is_nested(host), m.rows, m.cols);
    gn_status status;
    if (gn_cuda_is_tiled(&m))
        status = place_tiles<uint4, 2>(ctx, m.data, host->data, gn_cuda_blocks_of(&m));
    else
        status = gn_cuda_upload(ctx, (void *)m.data, host->data,
                                m.qtype == GN_Q_NONE ? gn_matrix_bytes(&m) : sizes.data);
    if (!status && m.qtype == GN_Q_INT8)
        status = gn_cuda_upload(ctx, (void *)m.absmax, host->absmax, sizes.absmax);
    if (!status && gn_qtype_is_4bit(m.qtype)) status = place_scales(ctx, &m, host, sizes);
    if (!status && m.code)
        status = gn_cuda_upload(ctx, (void *)m.code, host->code, 16 * sizeof(float));
    if (!status) *out = m;
    return status;
}
