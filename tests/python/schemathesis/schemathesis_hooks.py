"""Rules of the API that an OpenAPI document cannot express."""

import os

import schemathesis


@schemathesis.hook
def filter_case(context, case):
    body = case.body if isinstance(case.body, dict) else {}
    # The idempotency key may be in the header or in the body, but not two different keys.
    if (case.headers or {}).get("idempotency-key") is not None and body.get(
        "idempotency_key"
    ) is not None:
        return False
    # A form has no types: a value that is no string is sent as text, a valid file or number.
    if case.media_type == "multipart/form-data":
        if not isinstance(body.get("file", ""), (str, bytes)):
            return False
        # Part names are in headers, which must not contain control characters.
        if not all(name.isprintable() for name in body):
            return False
        if str(body.get("expires_after[seconds]", "")).isdigit() and isinstance(
            body["expires_after[seconds]"], str
        ):
            return False
    return True


@schemathesis.auth(refresh_interval=None)
class Keys:
    """Sends the key that the route needs."""

    def get(self, case, context):
        is_admin = case.operation.path.startswith("/organization")
        return os.environ["TEST_ADMIN_KEY" if is_admin else "TEST_PROJECT_KEY"]

    def set(self, case, data, context):
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}
