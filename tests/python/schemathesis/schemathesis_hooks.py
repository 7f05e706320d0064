"""What the OpenAPI document cannot say."""

import schemathesis


@schemathesis.hook
def filter_case(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    # The idempotency key may stand in the header or in the body, but not a different one in each.
    if (case.headers or {}).get("idempotency-key") is not None and body.get("idempotency_key") is not None:
        return False
    # A form has no types: what is no string is sent as its text, which is as good a file, or a number, as any.
    if case.media_type == "multipart/form-data":
        if not isinstance(body.get("file", ""), (str, bytes)):
            return False
        # Names of parts are in headers, which hold no control characters.
        if not all(name.isprintable() for name in body):
            return False
        if str(body.get("expires_after[seconds]", "")).isdigit() and isinstance(body["expires_after[seconds]"], str):
            return False
    return True
