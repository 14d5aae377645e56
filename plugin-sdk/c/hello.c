/* A reactor in C: says when it starts and what its cache holds every ten seconds, and answers calls with
 * what they were sent.
 *
 *     plugin-sdk/toolchain.sh c
 *     "$(plugin-sdk/toolchain.sh --bin)/wasm-cc" -Os -mexec-model=reactor -o hello_c.wasm plugin-sdk/c/hello.c
 *
 * Its manifest is hello_c.plugin.toml beside it.
 */
#include "stockade_plugin.h"

#define TEXT(text) (text), sizeof(text) - 1

static char buffer[64 * 1024];

/* Logs the answer of the last call, or the reason why there is none. */
static int32_t log_answer(int32_t result)
{
    int32_t length = stockade_answer_read(buffer, sizeof buffer);
    int32_t level = result < 0 ? STOCKADE_LOG_WARN : STOCKADE_LOG_INFO;
    return stockade_log(level, buffer, (size_t)length);
}

STOCKADE_HANDLER(start)
{
    (void)length;
    stockade_log(STOCKADE_LOG_INFO, TEXT("hello from C"));
    return stockade_timer_set(TEXT("look"), 10000, 10000) < 0;
}

STOCKADE_HANDLER(timer)
{
    (void)length;
    return log_answer(stockade_cache_stats()) < 0;
}

STOCKADE_HANDLER(call)
{
    (void)length;
    int32_t copied = stockade_message_body_read(buffer, sizeof buffer);
    return stockade_reply(buffer, (size_t)copied) < 0;
}
