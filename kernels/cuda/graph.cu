/* graph.cu - launches recorded once and repeated: a step of decoding is some 200 kernels, which
 * the host could not launch one by one as fast as they run. The least recently used recording
 * makes room for a new one. */
#include <stdlib.h>

#include "linear_ahead.h"

enum { MAX_GRAPHS = 128 };

struct gn_cuda_graph {
    uint64_t key, used;
    cudaGraphExec_t exec;
};

struct gn_cuda_graphs {
    struct gn_cuda_graph items[MAX_GRAPHS];
    int n;
    uint64_t clock;
};

void gn_cuda_graphs_close(struct gn_cuda *cuda) {
    if (!cuda->graphs) return;
    for (int i = 0; i < cuda->graphs->n; i++)
        (void)cudaGraphExecDestroy(cuda->graphs->items[i].exec);
    free(cuda->graphs);
    cuda->graphs = NULL;
}

static struct gn_cuda_graph *find(struct gn_cuda_graphs *graphs, uint64_t key) {
    for (int i = 0; i < graphs->n; i++)
        if (graphs->items[i].key == key) return &graphs->items[i];
    return NULL;
}

/* A place for one more, emptied if it was taken. */
static struct gn_cuda_graph *make_room(struct gn_cuda *cuda) {
    struct gn_cuda_graphs *graphs = cuda->graphs;
    if (graphs->n < MAX_GRAPHS) return &graphs->items[graphs->n++];
    struct gn_cuda_graph *oldest = &graphs->items[0];
    for (int i = 1; i < MAX_GRAPHS; i++)
        if (graphs->items[i].used < oldest->used) oldest = &graphs->items[i];
    (void)cudaStreamSynchronize(cuda->stream);
    (void)cudaGraphExecDestroy(oldest->exec);
    return oldest;
}

static gn_status record(gn_ctx *ctx, cudaGraphExec_t *exec, gn_ctx_ops *fn, void *arg) {
    cudaStream_t stream = ctx->cuda->stream;
    cudaGraph_t graph = NULL;
    gn_status status =
        gn_cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (status) return status;
    status = fn(arg);
    const gn_status dropped = gn_cuda_ahead_drop(ctx->cuda); /* no stream beside outlasts it */
    if (!status) status = dropped;
    const gn_status ended = gn_cuda_status(cudaStreamEndCapture(stream, &graph));
    if (!status) status = ended;
    if (!status) status = gn_cuda_status(cudaGraphInstantiate(exec, graph, 0));
    if (graph) (void)cudaGraphDestroy(graph);
    return status;
}

gn_status gn_cuda_replay(gn_ctx *ctx, uint64_t key, gn_ctx_ops *fn, void *arg) {
    struct gn_cuda *cuda = ctx->cuda;
    if (!cuda->graphs) {
        cuda->graphs = (struct gn_cuda_graphs *)calloc(1, sizeof *cuda->graphs);
        if (!cuda->graphs) return GN_ENOMEM;
    }
    const gn_status dropped = gn_cuda_ahead_drop(cuda); /* a recording begins without */
    if (dropped) return dropped;
    struct gn_cuda_graph *graph = find(cuda->graphs, key);
    if (!graph) {
        cudaGraphExec_t exec = NULL;
        const gn_status status = record(ctx, &exec, fn, arg);
        if (status) return status;
        graph = make_room(cuda);
        graph->key = key;
        graph->exec = exec;
    }
    graph->used = ++cuda->graphs->clock;
    return gn_cuda_status(cudaGraphLaunch(graph->exec, cuda->stream));
}
