//! Property test: validation of a random input file reports exactly its faults, with physical
//! lines.

use std::collections::HashMap;

use batchwright_domain::status::Status;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;

/// Value of `max_line_size`, in bytes.
const MAX_LINE_BYTES: usize = 4096;

/// Line of an input file, and the codes of the faults within the line.
#[derive(Clone, Debug)]
struct Sample {
    bytes: Vec<u8>,
    codes: Vec<&'static str>,
    custom_id: Option<String>,
}

/// Returns a line without a `custom_id`.
fn sample(bytes: impl Into<Vec<u8>>, codes: &[&'static str]) -> Sample {
    Sample { bytes: bytes.into(), codes: codes.to_vec(), custom_id: None }
}

/// Returns a line with the `custom_id` `c{number}` and with one replacement in its text.
fn changed(number: u64, old: &str, new: &str, codes: &[&'static str]) -> Sample {
    let custom_id = format!("c{number}");
    let whole = format!(
        concat!(
            r#"{{"custom_id":"{}","method":"POST","url":"{}","body":{{"model":"echo","#,
            r#""messages":[{{"role":"user","content":"hi"}}]}}}}"#
        ),
        custom_id, CHAT
    );
    assert!(whole.contains(old), "{old}");
    Sample {
        bytes: whole.replacen(old, new, 1).into(),
        codes: codes.to_vec(),
        custom_id: Some(custom_id),
    }
}

fn lines() -> impl Strategy<Value = Sample> {
    let number = 0..1_000_000_u64;
    let by = move |old: &'static str, new: &'static str, codes: &'static [&'static str]| {
        number.clone().prop_map(move |number| changed(number, old, new, codes)).boxed()
    };
    let deep = format!(r#""content":"hi","deep":{}{}"#, "[".repeat(500), "]".repeat(500));
    prop_oneof![
        20 => by("hi", "hi", &[]),
        // Few different ids, so that some occur twice.
        6 => (0..12_u64).prop_map(|number| changed(number, "hi", "ho", &[])),
        4 => prop::sample::select(vec!["", " ", "\t  ", "\r"]).prop_map(|text| sample(text, &[])),
        2 => by(
            r#""content":"hi""#,
            r#""content":"hi","n":[1e999,-0,1e-999,123456789012345678901234567890]"#,
            &[],
        ),
        1 => (0..1_000_000_u64)
            .prop_map(move |number| changed(number, r#""content":"hi""#, &deep, &[])),
        1 => by("hi", "\\u00fc\u{fc}\u{1f600}\\ud83d\\ude00", &[]),
        1 => by(r#""POST""#, r#""P\u004fST""#, &[]),
        // A lone surrogate is valid JSON but not valid Unicode text.
        1 => by(r#""content":"hi""#, r#""content":"hi","\ud800":"\udfff""#, &[]),
        1 => by(r#""model""#, r#""\ud800":1,"model""#, &[]),
        1 => by(r#"{"custom_id""#, r#"{"\ud800":1,"custom_id""#, &[]),
        1 => (0..1_000_000_u64).prop_map(|number| {
            let (old, new) = (r#""custom_id":""#, r#""custom_id":"\ud800"#);
            let line = changed(number, old, new, &["invalid_request"]);
            Sample { custom_id: None, ..line }
        }),
        1 => prop::collection::vec(0x80..0xff_u8, 1..9)
            .prop_map(|bytes| sample(bytes, &["invalid_json_line"])),
        // Not `{` alone: at the start of a file, it is an object that spans several lines.
        1 => prop::sample::select(vec![
            "{]", "nope", "{} {}", "{'a':1}", "x\u{feff}", "01", "{\"a\":\"\u{1}\"}",
        ])
            .prop_map(|text| sample(text, &["invalid_json_line"])),
        1 => prop::sample::select(vec!["[]", "1", "null", "\"x\"", "true", "1e999"])
            .prop_map(|text| sample(text, &["invalid_request"])),
        1 => Just(sample("{}", &["missing_required_parameter"; 4])),
        1 => by(r#""method":"POST","#, "", &["missing_required_parameter"]),
        1 => by(r#""POST""#, r#""GET""#, &["invalid_method"]),
        1 => by(CHAT, "/v1/embeddings", &["invalid_url"]),
        1 => by(
            r#""model":"echo","#,
            r#""model":"echo","stream":true,"#,
            &["streaming_unsupported"],
        ),
        1 => by(r#""model":"echo","#, "", &["invalid_request"]),
        1 => by(r#""echo""#, r#""nobody""#, &["model_not_found"]),
        1 => (MAX_LINE_BYTES..MAX_LINE_BYTES * 3)
            .prop_map(|length| sample("x".repeat(length + 1), &["line_too_long"])),
    ]
}

/// Returns the expected faults in order, each with its line and code, and the number of requests.
fn expected(samples: &[Sample]) -> (Vec<(u64, String)>, u64) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    let (mut faults, mut total) = (Vec::new(), 0);
    for (number, sample) in (1..).zip(samples) {
        if sample.bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        total += 1;
        faults.extend(sample.codes.iter().map(|code| (number as u64, (*code).to_owned())));
        if let Some(id) = &sample.custom_id
            && *first.entry(id).or_insert(number) != number
        {
            faults.push((number as u64, "duplicate_custom_id".to_owned()));
        }
    }
    (faults, total)
}

#[test]
fn validation_reports_every_fault_with_its_line() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let settings = format!("[batch]\nmax_line_size = \"{MAX_LINE_BYTES}B\"");
    let server = runtime.block_on(TestServer::new(&settings, ""));
    let file =
        (prop::collection::vec(lines(), 1..60), any::<bool>(), any::<[bool; 8]>(), any::<bool>());
    let mut runner = TestRunner::new(cases(100));
    let found = runner.run(&file, |(samples, byte_order_mark, endings, newline_at_end)| {
        let mut bytes = if byte_order_mark { b"\xef\xbb\xbf".to_vec() } else { Vec::new() };
        for (sample, carriage_return) in samples.iter().zip(endings.iter().cycle()) {
            bytes.extend(&sample.bytes);
            bytes.extend_from_slice(if *carriage_return { b"\r\n" } else { b"\n" });
        }
        if !newline_at_end {
            bytes.pop();
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let batch = runtime.block_on(async {
            let file = server.upload(&bytes, None).await;
            server.ended(&server.create_of(&file, None).await).await
        });
        let (faults, total) = expected(&samples);
        let reported: Vec<(u64, String)> = batch
            .errors
            .iter()
            .map(|error| (error.line.unwrap_or(0), error.code.clone()))
            .collect();
        if total == 0 {
            prop_assert_eq!(reported, [(0, "empty_file".to_owned())]);
        } else if faults.is_empty() {
            prop_assert_eq!((batch.status, batch.counts.total), (Status::Completed, total));
            // The adapter may reject unusual but valid lines, so both files count.
            let output = runtime.block_on(server.results(batch.output_file_id.as_ref()));
            let errors = runtime.block_on(server.results(batch.error_file_id.as_ref()));
            let mut ids: Vec<_> =
                samples.iter().filter_map(|sample| sample.custom_id.as_deref()).collect();
            let mut answered = [custom_ids(&output), custom_ids(&errors)].concat();
            ids.sort_unstable();
            answered.sort_unstable();
            prop_assert_eq!(answered, ids);
        } else {
            prop_assert_eq!(reported, faults);
            prop_assert_eq!(batch.status, Status::Failed);
        }
        Ok(())
    });
    found.unwrap();
}
