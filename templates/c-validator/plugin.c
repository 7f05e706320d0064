/* Validator that rejects requests for more tokens than the setting `max_tokens`. */

#include <stdio.h>

#include "json.h"
#include "validator.h"

static double max_tokens;

/* JSON Schema of the settings. */
static const char SCHEMA[] =
    "{\"type\":\"object\",\"properties\":{\"max_tokens\":{\"type\":\"integer\",\"minimum\":1,"
    "\"default\":4096,\"description\":\"Maximum number of tokens of a request\"}},"
    "\"additionalProperties\":false}";

void exports_batchwright_plugin_plugin_describe(
    exports_batchwright_plugin_plugin_description_t *ret) {
    memset(ret, 0, sizeof *ret);
    validator_string_dup(&ret->name, "{{name}}");
    validator_string_dup(&ret->version, "0.1.0");
    validator_string_dup(&ret->summary, "Limits the tokens of a request");
    validator_string_dup(&ret->settings_schema, SCHEMA);
}

bool exports_batchwright_plugin_plugin_configure(exports_batchwright_plugin_plugin_json_t *settings,
                                                 validator_string_t *err) {
    /* The host fills in the schema's defaults. */
    bool found =
        json_number(json_member((json_t){settings->ptr, settings->len}, "max_tokens"), &max_tokens);
    if (!found) validator_string_dup(err, "max_tokens is missing");
    exports_batchwright_plugin_plugin_json_free(settings);
    return found;
}

/* Appends a violation. */
static exports_batchwright_plugin_validation_violation_t *
add(exports_batchwright_plugin_validation_list_violation_t *found, uint64_t line, const char *code,
    const char *message) {
    exports_batchwright_plugin_validation_violation_t *grown =
        realloc(found->ptr, (found->len + 1) * sizeof *grown);
    if (!grown) abort();
    found->ptr = grown;
    exports_batchwright_plugin_validation_violation_t *violation = &grown[found->len++];
    memset(violation, 0, sizeof *violation);
    violation->line = line;
    validator_string_dup(&violation->code, code);
    validator_string_dup(&violation->message, message);
    return violation;
}

/* Reports a parameter that exceeds the limit. */
static void too_many(exports_batchwright_plugin_validation_list_violation_t *found, uint64_t line,
                     const char *field) {
    char message[80], param[80];
    snprintf(message, sizeof message, "At most %.0f tokens may be asked for.", max_tokens);
    snprintf(param, sizeof param, "body.%s", field);
    exports_batchwright_plugin_validation_violation_t *violation =
        add(found, line, "too_many_tokens", message);
    violation->param.is_some = true;
    validator_string_dup(&violation->param.val, param);
}

void exports_batchwright_plugin_validation_validate(
    exports_batchwright_plugin_validation_batch_t *batch,
    exports_batchwright_plugin_validation_list_line_t *lines,
    exports_batchwright_plugin_validation_list_violation_t *ret) {
    static const char *const fields[] = {"max_tokens", "max_completion_tokens"};
    ret->ptr = NULL;
    ret->len = 0;
    for (size_t index = 0; index < lines->len; index++) {
        json_t line = {lines->ptr[index].text.ptr, lines->ptr[index].text.len};
        /* Another parser may accept what this one rejects (more than 512 levels), so an unreadable
         * line must not pass. */
        if (!json_valid(line.ptr, line.ptr + line.len)) {
            add(ret, lines->ptr[index].number, "unreadable_line",
                "This line cannot be read as JSON.");
            continue;
        }
        json_t body = json_member(line, "body");
        for (size_t field = 0; field < 2; field++) {
            double tokens;
            json_t value = json_member(body, fields[field]);
            if (json_number(value, &tokens) && tokens > max_tokens) {
                too_many(ret, lines->ptr[index].number, fields[field]);
            }
        }
    }
    exports_batchwright_plugin_validation_batch_free(batch);
    exports_batchwright_plugin_validation_list_line_free(lines);
}
