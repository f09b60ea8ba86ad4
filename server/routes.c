/* routes.c - which handler answers which method and path, and who may ask. */
#include "server/routes.h"

#include <arpa/inet.h>
#include <llhttp.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "server/assets.h"
#include "server/state.h"

typedef struct route {
    int method;
    const char *path;
    gn_handler handler;
    bool open;   /* needs no key */
    bool prefix; /* what follows the path is part of the request */
} route;

static const route routes[] = {
    {HTTP_POST, "/v1/chat/completions", gn_post_chat_completions, false, false},
    {HTTP_POST, "/v1/completions", gn_post_completions, false, false},
    {HTTP_GET, "/v1/models", gn_get_models, false, false},
    {HTTP_GET, "/v1/models/", gn_get_model, false, true},
    {HTTP_POST, "/v1/load_lora_adapter", gn_post_load_adapter, false, false},
    {HTTP_POST, "/v1/unload_lora_adapter", gn_post_unload_adapter, false, false},
    {HTTP_POST, "/tokenize", gn_post_tokenize, false, false},
    {HTTP_POST, "/detokenize", gn_post_detokenize, false, false},
    {HTTP_GET, "/metrics", gn_get_metrics, false, false},
    {HTTP_GET, "/health", gn_get_health, true, false},
};
enum { N_ROUTES = sizeof routes / sizeof *routes };

static const route page_route = {HTTP_GET, NULL, gn_get_page, true, true};

static bool is_page(const char *path) {
    for (size_t i = 0; i < gn_assets_count; i++) {
        if (strcmp(gn_assets[i].path, path) == 0) return true;
    }
    return false;
}

static const route *find_route(gn_exchange *x) {
    for (int i = 0; i < N_ROUTES; i++) {
        const route *r = &routes[i];
        const size_t n = strlen(r->path);
        if (strncmp(x->path, r->path, n) != 0 || (!r->prefix && x->path[n])) continue;
        x->rest = x->path + n;
        return r;
    }
    return is_page(x->path) ? &page_route : NULL;
}

/* ---- other sites' pages ---- */

static bool cors_allows(const gn_server *s, const char *origin) {
    const char *allowed = s->options.cors;
    return allowed && (strcmp(allowed, "*") == 0 || strcasecmp(allowed, origin) == 0);
}

/* "http://name:80" is made at "name:80"? */
static bool same_host(const char *origin, const char *host) {
    const char *authority = strstr(origin, "://");
    return authority && host && strcasecmp(authority + 3, host) == 0;
}

/* A host that no attacker's DNS can make mean this machine: an address, or localhost. */
static bool is_own_host(const char *host) {
    char name[64];
    struct in6_addr address;
    const bool bracketed = host[0] == '[';
    const size_t n = strcspn(host + bracketed, bracketed ? "]" : ":");
    if (n >= sizeof name) return false;
    memcpy(name, host + bracketed, n);
    name[n] = 0;
    return strcasecmp(name, "localhost") == 0 || inet_pton(AF_INET, name, &address) == 1 ||
           inet_pton(AF_INET6, name, &address) == 1;
}

static bool is_loopback(const char *host) {
    return strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0 ||
           strcasecmp(host, "localhost") == 0;
}

/* Without a key, a page the user happens to visit must not be able to use the server: a browser
 * names the page's origin with every POST. Host names that are not ours are refused as well
 * when we serve this machine only, because a name's meaning can be changed (DNS rebinding). */
static bool is_foreign(const gn_exchange *x) {
    const gn_server *s = x->server;
    const char *origin = gn_http_header(x, "origin"), *host = gn_http_header(x, "host");
    if (s->options.api_key || !origin || x->method != HTTP_POST) return false;
    if (cors_allows(s, origin)) return false;
    if (!same_host(origin, host)) return true;
    return is_loopback(s->options.host) && !is_own_host(host);
}

const char *gn_cors_headers(const gn_exchange *x, char *line, size_t size) {
    const char *origin = gn_http_header(x, "origin");
    line[0] = 0;
    if (!origin || strlen(origin) > 256 || !cors_allows(x->server, origin)) return line;
    snprintf(line, size, "Access-Control-Allow-Origin: %s\r\nVary: Origin\r\n", origin);
    return line;
}

static void preflight(gn_exchange *x) {
    char headers[1024];
    const char *wanted = gn_http_header(x, "access-control-request-headers");
    if (!wanted || strlen(wanted) > 512) wanted = "authorization, content-type";
    snprintf(headers, sizeof headers,
             "Access-Control-Allow-Methods: GET, POST\r\n"
             "Access-Control-Allow-Headers: %s\r\n"
             "Access-Control-Max-Age: 86400\r\n",
             wanted);
    gn_respond(x, 204, NULL, headers, "", 0);
}

/* ---- keys ---- */

/* Takes the same time wherever the texts differ, so that a key cannot be found letter by letter. */
static bool equal_keys(const char *given, const char *key) {
    const size_t n = strlen(given), length = strlen(key);
    unsigned char difference = n != length;
    for (size_t i = 0; i < n; i++)
        difference |= (unsigned char)(given[i] ^ key[length ? i % length : 0]);
    return difference == 0;
}

static bool has_key(const gn_exchange *x) {
    static const char scheme[] = "bearer ";
    const char *key = x->server->options.api_key, *given = gn_http_header(x, "authorization");
    if (!key) return true;
    if (!given || strncasecmp(given, scheme, sizeof scheme - 1) != 0) return false;
    given += sizeof scheme - 1;
    return equal_keys(given + strspn(given, " "), key);
}

/* ---- routing ---- */

static void refuse_method(gn_exchange *x, const route *r) {
    gn_http_error *e = &x->refusal;
    const char *allowed = r->method == HTTP_GET ? "GET, HEAD" : "POST";
    snprintf(e->headers, sizeof e->headers, "Allow: %s\r\n", allowed);
    gn_http_fail(e, 405, "method_not_allowed", "", "%s is not a method of %s; it knows %s.",
                 llhttp_method_name((llhttp_method_t)x->method), x->path, allowed);
}

void gn_route(gn_exchange *x) {
    const route *r = find_route(x);
    const char *origin = gn_http_header(x, "origin");
    if (!r) {
        gn_http_fail(&x->refusal, 404, "not_found", "", "There is nothing at %s.", x->path);
    } else if (x->method == HTTP_OPTIONS && origin && cors_allows(x->server, origin)) {
        x->handler = preflight;
    } else if (x->method != r->method && !(x->method == HTTP_HEAD && r->method == HTTP_GET)) {
        refuse_method(x, r);
    } else if (!r->open && !has_key(x)) {
        snprintf(x->refusal.headers, sizeof x->refusal.headers, "WWW-Authenticate: Bearer\r\n");
        gn_http_fail(&x->refusal, 401, "invalid_api_key", "",
                     "This server needs a key: send it as \"Authorization: Bearer KEY\".");
    } else if (is_foreign(x)) {
        gn_http_fail(&x->refusal, 403, "foreign_origin", "",
                     "A page of %.200s may not use this server; start it with --cors %.200s to "
                     "allow that.",
                     origin, origin);
    } else {
        x->handler = r->handler;
    }
}
