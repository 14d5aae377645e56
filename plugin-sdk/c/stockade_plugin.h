/* The imports of stockade:plugin/v1, for plugins in C and what compiles like it.
 *
 * What each call does, costs and needs is in ../abi/README.md. Every call returns at least 0, or one of the
 * codes below; where it has an answer the result is its length, and stockade_answer_read copies it. After a
 * code below 0 the answer is the reason, as a sentence. Nothing here allocates.
 *
 * A reactor exports handlers with STOCKADE_HANDLER and is built with -mexec-model=reactor; a command has a
 * main and waits with stockade_next_message. See hello.c.
 */
#ifndef STOCKADE_PLUGIN_H
#define STOCKADE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STOCKADE_IMPORT(name) __attribute__((import_module("stockade:plugin/v1"), import_name(#name)))

/* Defines the handler of that name: start, timer, events, call, rank or shutdown. `length` is the number of
 * bytes of the message; the result is 0, or another number for a failure. */
#define STOCKADE_HANDLER(name) \
    __attribute__((export_name("stockade_" #name))) int32_t stockade_on_##name(int32_t length)

/* Why a call came to nothing. */
enum stockade_error {
    STOCKADE_DENIED = -1,      /* not granted; the answer has the line to add */
    STOCKADE_INVALID = -2,     /* an argument is not what the contract says */
    STOCKADE_NOT_FOUND = -3,   /* no such key, timer or object */
    STOCKADE_LIMIT = -4,       /* a limit of the plugin's own is used up */
    STOCKADE_TIMEOUT = -5,     /* it took longer than it may */
    STOCKADE_UNAVAILABLE = -6, /* the other side is not there */
    STOCKADE_STATE = -7        /* makes no sense now */
};

/* Levels of the log. */
enum stockade_level {
    STOCKADE_LOG_ERROR = 0,
    STOCKADE_LOG_WARN = 1,
    STOCKADE_LOG_INFO = 2,
    STOCKADE_LOG_DEBUG = 3,
    STOCKADE_LOG_TRACE = 4
};

/* Copies the answer of the last call that had one, at most `cap` bytes. */
STOCKADE_IMPORT(answer_read) int32_t stockade_answer_read(void *ptr, size_t cap);
/* Length of the answer that is kept. */
STOCKADE_IMPORT(answer_length) int32_t stockade_answer_length(void);
/* Copies the message at hand, JSON in UTF-8. */
STOCKADE_IMPORT(message_read) int32_t stockade_message_read(void *ptr, size_t cap);
/* Copies the raw bytes of the message at hand: the payload of a call. */
STOCKADE_IMPORT(message_body_read) int32_t stockade_message_body_read(void *ptr, size_t cap);
/* Waits for the next message; below 0 without end. For commands. */
STOCKADE_IMPORT(next_message) int32_t stockade_next_message(int32_t timeout_ms);
/* Gives the reply to the message at hand. */
STOCKADE_IMPORT(reply) int32_t stockade_reply(const void *ptr, size_t len);

/* One line of the log. */
STOCKADE_IMPORT(log) int32_t stockade_log(int32_t level, const char *ptr, size_t len);
/* Answer: the server's settings, JSON. */
STOCKADE_IMPORT(config) int32_t stockade_config(void);
/* Milliseconds of the Unix epoch. */
STOCKADE_IMPORT(clock_ms) int64_t stockade_clock_ms(void);

/* Starts or replaces the timer of that name; `every_ms` 0 for once. */
STOCKADE_IMPORT(timer_set)
int32_t stockade_timer_set(const char *name, size_t len, int32_t after_ms, int32_t every_ms);
/* Ends a timer. */
STOCKADE_IMPORT(timer_cancel) int32_t stockade_timer_cancel(const char *name, size_t len);

/* Answer: the value of a key. Needs state_kib, as the three after it. */
STOCKADE_IMPORT(state_get) int32_t stockade_state_get(const char *key, size_t len);
/* Sets the value of a key. */
STOCKADE_IMPORT(state_set)
int32_t stockade_state_set(const char *key, size_t key_len, const void *value, size_t len);
/* Removes a key. */
STOCKADE_IMPORT(state_delete) int32_t stockade_state_delete(const char *key, size_t len);
/* Answer: JSON list of the keys with a prefix. */
STOCKADE_IMPORT(state_keys) int32_t stockade_state_keys(const char *prefix, size_t len);

/* Adds to a counter of the plugin's own. */
STOCKADE_IMPORT(metric_add) int32_t stockade_metric_add(const char *name, size_t len, double value);
/* Sets a gauge of the plugin's own. */
STOCKADE_IMPORT(metric_set) int32_t stockade_metric_set(const char *name, size_t len, double value);

/* Answer: JSON. Needs cache = ["stats"]. */
STOCKADE_IMPORT(cache_stats) int32_t stockade_cache_stats(void);
/* Answer: a JSON page of keys. Needs cache = ["keys"]. */
STOCKADE_IMPORT(cache_keys) int32_t stockade_cache_keys(const char *query, size_t len);
/* Pins, unpins, evicts or prefetches; answer: JSON. Needs cache = ["pin"], ["evict"] or ["prefetch"]. */
STOCKADE_IMPORT(cache_request) int32_t stockade_cache_request(const char *request, size_t len);
/* From then on events come. Needs cache = ["events"]. */
STOCKADE_IMPORT(events_subscribe) int32_t stockade_events_subscribe(const char *request, size_t len);

/* Answer: the JSON head of the response. Needs an [[http]] table. */
STOCKADE_IMPORT(http_request)
int32_t stockade_http_request(const char *request, size_t len, const void *body, size_t body_len);
/* Copies the next bytes of the response's body; 0 at its end. */
STOCKADE_IMPORT(http_body_read) int32_t stockade_http_body_read(void *ptr, size_t cap);

#ifdef __cplusplus
}
#endif

#endif
