/* Adapter that forwards chat completions to the provider at `base_url`. */

#include <stdio.h>
#include <strings.h>

#include "adapter.h"
#include "json.h"

typedef exports_batchwright_plugin_inference_step_t step_t;
typedef exports_batchwright_plugin_inference_answer_t answer_t;

/* Base URL of the provider, without a slash at the end. */
static char *base_url;

/* JSON Schema of the settings. */
static const char SCHEMA[] =
    "{\"type\":\"object\",\"properties\":{\"base_url\":{\"type\":\"string\","
    "\"pattern\":\"^https?://[^\\\\\\\\]*$\",\"description\":\"URL before /chat/completions\"}},"
    "\"required\":[\"base_url\"],\"additionalProperties\":false}";

/* Text that grows. */
typedef struct {
    uint8_t *ptr;
    size_t len;
} text_t;

/* Appends bytes. */
static void add(text_t *text, const void *bytes, size_t len) {
    uint8_t *grown = realloc(text->ptr, text->len + len + 1);
    if (!grown) abort();
    if (len) memcpy(grown + text->len, bytes, len);
    text->ptr = grown;
    text->len += len;
    text->ptr[text->len] = 0;
}

/* Appends a JSON string. */
static void add_quoted(text_t *text, const uint8_t *bytes, size_t len) {
    char escaped[8];
    add(text, "\"", 1);
    for (size_t at = 0; at < len; at++) {
        if (bytes[at] == '"' || bytes[at] == '\\') add(text, "\\", 1);
        if (bytes[at] < 0x20) {
            int length = snprintf(escaped, sizeof escaped, "\\u%04x", bytes[at]);
            add(text, escaped, (size_t)length);
        } else {
            add(text, &bytes[at], 1);
        }
    }
    add(text, "\"", 1);
}

static answer_t failure(const char *code, const char *message, size_t len) {
    answer_t answer = {.tag = EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_ANSWER_FAILURE};
    adapter_string_dup(&answer.val.failure.code, code);
    adapter_string_dup_n(&answer.val.failure.message, message, len);
    return answer;
}

static answer_t response(uint16_t status, const void *body, size_t len) {
    answer_t answer = {.tag = EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_ANSWER_RESPONSE};
    answer.val.response.status = status;
    adapter_string_dup_n(&answer.val.response.body, body, len);
    return answer;
}

static step_t done(answer_t answer) {
    step_t step = {.tag = EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_STEP_DONE};
    step.val.done = answer;
    return step;
}

static step_t retry(answer_t otherwise) {
    step_t step = {.tag = EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_STEP_RETRY};
    step.val.retry.otherwise = otherwise;
    return step;
}

void exports_batchwright_plugin_plugin_describe(
    exports_batchwright_plugin_plugin_description_t *ret) {
    memset(ret, 0, sizeof *ret);
    adapter_string_dup(&ret->name, "{{name}}");
    adapter_string_dup(&ret->version, "0.1.0");
    adapter_string_dup(&ret->summary, "Forwards chat completions");
    ret->endpoints.ptr = malloc(sizeof *ret->endpoints.ptr);
    /* The host adds the secret to each request. The plugin never sees it. */
    ret->credentials.ptr = calloc(1, sizeof *ret->credentials.ptr);
    if (!ret->endpoints.ptr || !ret->credentials.ptr) abort();
    ret->endpoints.len = ret->credentials.len = 1;
    adapter_string_dup(ret->endpoints.ptr, "/v1/chat/completions");
    adapter_string_dup(&ret->credentials.ptr->name, "api_key");
    adapter_string_dup(&ret->credentials.ptr->header, "authorization");
    adapter_string_dup(&ret->credentials.ptr->prefix, "Bearer ");
    adapter_string_dup(&ret->settings_schema, SCHEMA);
}

bool exports_batchwright_plugin_plugin_configure(exports_batchwright_plugin_plugin_json_t *settings,
                                                 adapter_string_t *err) {
    json_t given = json_member((json_t){settings->ptr, settings->len}, "base_url");
    bool found = given.len > 2;
    if (found) {
        text_t url = {NULL, 0};
        add(&url, given.ptr + 1, given.len - 2);
        while (url.len && url.ptr[url.len - 1] == '/') url.ptr[--url.len] = 0;
        base_url = (char *)url.ptr;
    } else {
        adapter_string_dup(err, "base_url is missing");
    }
    exports_batchwright_plugin_plugin_json_free(settings);
    return found;
}

static bool known_role(json_t role) {
    static const char *const roles[] = {"system",    "developer", "user",
                                        "assistant", "tool",      "function"};
    for (size_t index = 0; index < sizeof roles / sizeof *roles; index++) {
        if (json_is(role, roles[index])) return true;
    }
    return false;
}

/* Returns the request to send, or refuses it. */
static step_t begin(const exports_batchwright_plugin_inference_request_t *request) {
    static const char DUPLICATE[] = "The body has 'model' or 'messages' more than once.";
    size_t models, lists;
    json_t body = {request->body.ptr, request->body.len};
    json_t model = json_member_counted(body, "model", &models);
    json_t messages = json_member_counted(body, "messages", &lists);
    /* Parsers disagree about which of two equal keys counts, so the request is refused. */
    if (models > 1 || lists > 1) {
        return done(failure("invalid_request", DUPLICATE, sizeof DUPLICATE - 1));
    }
    const uint8_t *at = NULL;
    for (json_t message = json_next(messages, &at); message.ptr;
         message = json_next(messages, &at)) {
        json_t role = json_member(message, "role");
        if (known_role(role)) continue;
        text_t text = {NULL, 0};
        bool plain = role.len > 2 && role.ptr[0] == '"';
        add(&text, "Unknown message role: ", 22);
        add(&text, plain ? (const char *)role.ptr + 1 : "none", plain ? role.len - 2 : 4);
        step_t refused = done(failure("invalid_request", (char *)text.ptr, text.len));
        free(text.ptr);
        return refused;
    }
    /* Replaces only the bytes of the model, so that no number and no text changes. The host
     * guarantees that the body is an object. */
    text_t sent_body = {NULL, 0}, url = {NULL, 0};
    if (model.ptr) {
        const uint8_t *rest = model.ptr + model.len;
        add(&sent_body, body.ptr, (size_t)(model.ptr - body.ptr));
        add_quoted(&sent_body, request->model.ptr, request->model.len);
        add(&sent_body, rest, (size_t)(body.ptr + body.len - rest));
    } else {
        add(&sent_body, body.ptr, body.len);
    }
    add(&url, base_url, strlen(base_url));
    add(&url, "/chat/completions", 17);
    step_t step = {.tag = EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_STEP_SEND};
    exports_batchwright_plugin_inference_http_request_t *sent = &step.val.send.request;
    adapter_string_dup(&sent->method, "POST");
    sent->url = (adapter_string_t){url.ptr, url.len};
    sent->headers.ptr = malloc(sizeof *sent->headers.ptr);
    if (!sent->headers.ptr) abort();
    sent->headers.len = 1;
    adapter_string_dup(&sent->headers.ptr->name, "content-type");
    adapter_string_dup(&sent->headers.ptr->value, "application/json");
    sent->body = (adapter_list_u8_t){sent_body.ptr, sent_body.len};
    /* The state holds data for `resume`, which may run in another instance. Here it is empty. */
    return step;
}

/* Returns a token count of the usage; 0 if it is absent. */
static uint64_t tokens(json_t usage, const char *part, const char *name) {
    double number = 0;
    json_t place = part ? json_member(usage, part) : usage;
    bool valid = json_number(json_member(place, name), &number) && number >= 0 && number < 1e15;
    return valid ? (uint64_t)number : 0;
}

/* Returns true if the bytes are UTF-8 (RFC 3629). */
static bool is_utf8(const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        uint8_t first = *at++;
        int more = 0;
        if (first >= 0xf5 || (first >= 0x80 && first < 0xc2)) return false;
        if (first >= 0xc2) more = first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        if (end - at < more) return false;
        /* Rejects overlong forms, surrogates and code points above U+10FFFF. */
        if (first == 0xe0 && *at < 0xa0) return false;
        if (first == 0xed && *at > 0x9f) return false;
        if (first == 0xf0 && *at < 0x90) return false;
        if (first == 0xf4 && *at > 0x8f) return false;
        for (; more > 0; more--) {
            if ((*at++ & 0xc0) != 0x80) return false;
        }
    }
    return true;
}

/* Returns the step after a response of the provider. */
static step_t answered(const exports_batchwright_plugin_inference_http_response_t *given) {
    static const char PROVIDER_ERROR[] =
        "{\"error\":{\"message\":\"The provider answered with status %u.\","
        "\"type\":\"provider_error\",\"param\":null,\"code\":null}}";
    static const char NOT_AN_OBJECT[] = "The provider's answer is not a JSON object.";
    json_t body = {given->body.ptr, given->body.len};
    const uint8_t *end = body.ptr + body.len, *first = body.len ? json_space(body.ptr, end) : end;
    bool is_object =
        first < end && *first == '{' && json_valid(first, end) && is_utf8(body.ptr, end);
    if (given->status >= 200 && given->status < 300) {
        if (!is_object) {
            return done(
                failure("invalid_provider_response", NOT_AN_OBJECT, sizeof NOT_AN_OBJECT - 1));
        }
        answer_t answer = response(given->status, body.ptr, body.len);
        json_t usage = json_member(body, "usage");
        if (tokens(usage, NULL, "prompt_tokens") || tokens(usage, NULL, "completion_tokens")) {
            answer.val.response.usage.is_some = true;
            answer.val.response.usage.val = (exports_batchwright_plugin_inference_usage_t){
                .input_tokens = tokens(usage, NULL, "prompt_tokens"),
                .cached_input_tokens = tokens(usage, "prompt_tokens_details", "cached_tokens"),
                .output_tokens = tokens(usage, NULL, "completion_tokens"),
                .reasoning_tokens = tokens(usage, "completion_tokens_details", "reasoning_tokens"),
            };
        }
        return done(answer);
    }
    char error[sizeof PROVIDER_ERROR + 8];
    int error_len = snprintf(error, sizeof error, PROVIDER_ERROR, given->status);
    bool has_error = is_object && json_member(body, "error").ptr;
    answer_t refused = has_error ? response(given->status, body.ptr, body.len)
                                 : response(given->status, error, (size_t)error_len);
    if (given->status != 429 && given->status < 500) return done(refused);
    step_t again = retry(refused);
    for (size_t index = 0; index < given->headers.len; index++) {
        const exports_batchwright_plugin_inference_header_t *header = &given->headers.ptr[index];
        double seconds;
        json_t value = {header->value.ptr, header->value.len};
        bool is_retry_after = header->name.len == 11 &&
                              strncasecmp((const char *)header->name.ptr, "retry-after", 11) == 0;
        /* For a date, the host's own backoff applies. */
        if (is_retry_after && json_number(value, &seconds) && seconds >= 0 && seconds < 1e6) {
            again.val.retry.after_milliseconds.is_some = true;
            again.val.retry.after_milliseconds.val = (uint64_t)(seconds * 1000);
        }
    }
    return again;
}

/* Translates the response, or retries the request. */
static step_t resume(const exports_batchwright_plugin_inference_outcome_t *outcome) {
    static const char NEVER_WAITS[] = "This adapter never waits.";
    switch (outcome->tag) {
    case EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_OUTCOME_RESPONSE:
        return answered(&outcome->val.response);
    case EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_OUTCOME_ERROR: {
        const exports_batchwright_plugin_inference_transport_error_t *error = &outcome->val.error;
        answer_t unreachable =
            failure("provider_unreachable", (const char *)error->message.ptr, error->message.len);
        bool permanent =
            error->fault == EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_TRANSPORT_FAULT_NOT_ALLOWED ||
            error->fault == EXPORTS_BATCHWRIGHT_PLUGIN_INFERENCE_TRANSPORT_FAULT_TOO_LARGE;
        return permanent ? done(unreachable) : retry(unreachable);
    }
    default:
        return done(failure("adapter_error", NEVER_WAITS, sizeof NEVER_WAITS - 1));
    }
}

/* The plugin frees the arguments. The bindings free the returned step. */
void exports_batchwright_plugin_inference_begin(
    exports_batchwright_plugin_inference_request_t *request, step_t *ret) {
    *ret = begin(request);
    exports_batchwright_plugin_inference_request_free(request);
}

void exports_batchwright_plugin_inference_resume(
    adapter_list_u8_t *state, exports_batchwright_plugin_inference_outcome_t *outcome,
    step_t *ret) {
    *ret = resume(outcome);
    adapter_list_u8_free(state);
    exports_batchwright_plugin_inference_outcome_free(outcome);
}
