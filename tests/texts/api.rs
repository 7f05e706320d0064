//! Error objects of the API, and its OpenAPI document.

use crate::{TestServer, check};

/// Method, path, headers and body of a request.
type Request = (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static str);

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];
const FORM: &[(&str, &str)] = &[("content-type", "multipart/form-data; boundary=b")];

const REFUSED: [Request; 31] = [
    ("GET", "/v1/unknown", &[], ""),
    ("PUT", "/v1/batches", JSON, "{}"),
    ("GET", "/v1/batches/batch_0", &[], ""),
    ("GET", "/v1/batches?after=batch_0", &[], ""),
    ("GET", "/v1/batches?limit=0", &[], ""),
    ("GET", "/v1/batches?limit=many", &[], ""),
    ("GET", "/v1/batches?limit=101", &[], ""),
    ("POST", "/v1/batches/batch_0/cancel", &[], ""),
    ("POST", "/v1/batches", &[("content-type", "text/plain")], "{}"),
    ("POST", "/v1/batches", JSON, "{"),
    ("POST", "/v1/batches", JSON, "[]"),
    ("POST", "/v1/batches", JSON, "{}"),
    ("POST", "/v1/batches", JSON, r#"{"input_file_id":1}"#),
    ("POST", "/v1/batches", JSON, r#"{"input_file_id":"f","endpoint":"/v1/images"}"#),
    (
        "POST",
        "/v1/batches",
        JSON,
        r#"{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"1h"}"#,
    ),
    (
        "POST",
        "/v1/batches",
        JSON,
        r#"{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"24h","metadata":{"tags":[]}}"#,
    ),
    (
        "POST",
        "/v1/batches",
        JSON,
        r#"{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"24h","metadata":"x"}"#,
    ),
    (
        "POST",
        "/v1/batches",
        JSON,
        r#"{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"24h","output_expires_after":{"anchor":"created_at","seconds":1}}"#,
    ),
    (
        "POST",
        "/v1/batches",
        JSON,
        r#"{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"24h","priority":1}"#,
    ),
    ("GET", "/v1/files/file-0", &[], ""),
    ("GET", "/v1/files/file-0/content", &[], ""),
    ("DELETE", "/v1/files/file-0", &[], ""),
    ("GET", "/v1/files?order=up", &[], ""),
    ("GET", "/v1/files?limit=0", &[], ""),
    ("POST", "/v1/files", JSON, "{}"),
    ("POST", "/v1/files", FORM, "--b--\r\n"),
    (
        "POST",
        "/v1/files",
        FORM,
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--b--\r\n",
    ),
    (
        "POST",
        "/v1/files",
        FORM,
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nother\r\n\
         --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\
         x\r\n--b--\r\n",
    ),
    (
        "POST",
        "/v1/files",
        FORM,
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\r\n--b--\r\n",
    ),
    ("GET", "/v1/models/none", &[], ""),
    ("POST", "/v1/batches", &[("origin", "https://evil.example.com")], "{}"),
];

#[test]
fn error_objects() {
    let server = TestServer::start(&[]);
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut text = String::new();
    for (method, path, headers, body) in REFUSED {
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("{}{path}", server.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut answer = agent.run(request.body(body).unwrap()).unwrap();
        let status = answer.status().as_u16();
        let said = answer.body_mut().read_to_string().unwrap();
        text.push_str(&format!("{method} {path}\n"));
        if !body.is_empty() {
            text.push_str(&format!("{}\n", body.replace("\r\n", "\\r\\n")));
        }
        text.push_str(&format!("{status} {said}\n\n"));
    }
    check("api-errors", &text);
}

#[test]
fn openapi_document() {
    let server = TestServer::start(&[]);
    let mut answer = ureq::get(format!("{}/openapi.json", server.url)).call().unwrap();
    let document: serde_json::Value =
        serde_json::from_reader(answer.body_mut().as_reader()).unwrap();
    check("openapi", &serde_json::to_string_pretty(&document).unwrap());
}
