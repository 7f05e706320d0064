//! Bindings that are generated from `wit/v0.1`, with conversions to and from the domain types.

use batchwright_egress::{HttpRequest, HttpResponse, TransportError, TransportErrorKind};
use wasmtime::component::{HasData, InstancePre, Linker};
use wasmtime::{Store, StoreContextMut};

use crate::contract::guest_log::GuestLog;
use crate::contract::types;

/// Interface that a component of the world `validator` exports.
pub(crate) const VALIDATION: &str = "batchwright:plugin/validation@0.1.0";
/// Interface that a component of the world `adapter` exports.
pub(crate) const INFERENCE: &str = "batchwright:plugin/inference@0.1.0";
/// Optional interface that an adapter may export.
pub(crate) const CLASSIFICATION: &str = "batchwright:plugin/classification@0.1.0";
/// Optional interface that an adapter may export.
pub(crate) const STREAMING: &str = "batchwright:plugin/streaming@0.1.0";
/// Interface that every plugin exports.
pub(crate) const PLUGIN: &str = "batchwright:plugin/plugin@0.1.0";

/// Generated bindings of the world `validator`.
pub(crate) mod validator {
    wasmtime::component::bindgen!({
        path: "../../wit/v0.1", world: "validator", exports: { default: async },
    });
}

/// Generated bindings of the world `adapter`.
pub(crate) mod adapter {
    wasmtime::component::bindgen!({
        path: "../../wit/v0.1", world: "adapter", exports: { default: async },
        with: { "batchwright:plugin/logging": super::validator::batchwright::plugin::logging },
    });
}

/// Generated bindings of the interface `classification`, in a world of its own because the
/// interface is optional for adapters.
pub(crate) mod classifier {
    wasmtime::component::bindgen!({
        inline: "
            package batchwright:host;
            world classifier { export batchwright:plugin/classification@0.1.0; }
        ",
        path: "../../wit/v0.1", world: "batchwright:host/classifier", exports: { default: async },
    });
}

/// Generated bindings of the interface `streaming`, which is optional for adapters too.
pub(crate) mod streamer {
    wasmtime::component::bindgen!({
        inline: "
            package batchwright:host;
            world streamer { export batchwright:plugin/streaming@0.1.0; }
        ",
        path: "../../wit/v0.1", world: "batchwright:host/streamer", exports: { default: async },
    });
}

use adapter::exports::batchwright::plugin::inference;
use classifier::exports::batchwright::plugin::classification;
use validator::exports::batchwright::plugin::validation;

use validator::batchwright::plugin::logging;

/// Linked component, from which instances are created.
pub(crate) enum Template<T: 'static> {
    /// Component of the world `validator`.
    Validator(validator::ValidatorPre<T>),
    /// Component of the world `adapter`.
    Adapter {
        /// Component with its imports.
        linked: InstancePre<T>,
        /// Exports of the world.
        adapter: adapter::AdapterIndices,
        /// Exports of the optional interface `classification`.
        classifier: Option<classifier::ClassifierIndices>,
        /// Exports of the optional interface `streaming`.
        streamer: Option<streamer::StreamerIndices>,
    },
}

impl<T: Send + 'static> Template<T> {
    /// Creates a template from a linked component of a kind.
    pub(crate) fn new(
        linked: InstancePre<T>,
        kind: types::Kind,
        (classifies, streams): (bool, bool),
    ) -> wasmtime::Result<Self> {
        if kind == types::Kind::Validator {
            return validator::ValidatorPre::new(linked).map(Self::Validator);
        }
        let adapter = adapter::AdapterIndices::new(&linked)?;
        let classifier =
            classifies.then(|| classifier::ClassifierIndices::new(&linked)).transpose()?;
        let streamer = streams.then(|| streamer::StreamerIndices::new(&linked)).transpose()?;
        Ok(Self::Adapter { linked, adapter, classifier, streamer })
    }

    /// Creates an instance and returns its functions.
    pub(crate) async fn instantiate(
        &self,
        mut store: StoreContextMut<'_, T>,
    ) -> wasmtime::Result<Exports> {
        match self {
            Self::Validator(pre) => pre.instantiate_async(store).await.map(Exports::Validator),
            Self::Adapter { linked, adapter, classifier, streamer } => {
                let instance = linked.instantiate_async(&mut store).await?;
                let exports = adapter.load(&mut store, &instance)?;
                let classifier = classifier
                    .as_ref()
                    .map(|known| known.load(&mut store, &instance))
                    .transpose()?;
                let streamer =
                    streamer.as_ref().map(|known| known.load(&mut store, &instance)).transpose()?;
                Ok(Exports::Adapter(exports, classifier, streamer))
            }
        }
    }

    /// Returns true if the component exports `classification`.
    pub(crate) fn classifies(&self) -> bool {
        matches!(self, Self::Adapter { classifier: Some(_), .. })
    }

    /// Returns true if the component exports `streaming`.
    pub(crate) fn streams(&self) -> bool {
        matches!(self, Self::Adapter { streamer: Some(_), .. })
    }
}

/// Host side of the interface `logging`, which writes to the data of a store.
struct Logging<'a, T>(&'a mut T);

/// Type that names [`Logging`] for any lifetime.
struct HasLogging<T>(std::marker::PhantomData<T>);

impl<T: GuestLog> HasData for HasLogging<T> {
    type Data<'a> = Logging<'a, T>;
}

impl<T: GuestLog> logging::Host for Logging<'_, T> {
    fn log(&mut self, level: logging::Level, message: String) {
        let level = match level {
            logging::Level::Error => tracing::Level::ERROR,
            logging::Level::Warn => tracing::Level::WARN,
            logging::Level::Info => tracing::Level::INFO,
            logging::Level::Debug => tracing::Level::DEBUG,
        };
        self.0.write(level, message);
    }
}

/// Adds the interface `logging` to a linker.
pub(crate) fn add_to_linker<T: GuestLog>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    logging::add_to_linker::<T, HasLogging<T>>(linker, |data| Logging(data))
}

/// Exported functions of an instance.
pub(crate) enum Exports {
    /// Exports of a validator.
    Validator(validator::Validator),
    /// Exports of an adapter, with the optional interfaces `classification` and `streaming`.
    Adapter(adapter::Adapter, Option<classifier::Classifier>, Option<streamer::Streamer>),
}

/// Converts the result of `describe`. The interface `plugin` is the same in both worlds, but its
/// types are generated twice.
macro_rules! described {
    ($description:expr) => {{
        let description = $description;
        (
            types::Description {
                name: description.name,
                version: description.version,
                summary: description.summary,
                endpoints: description.endpoints,
                credentials: description
                    .credentials
                    .into_iter()
                    .map(|need| types::CredentialRequest {
                        name: need.name,
                        header: need.header,
                        prefix: need.prefix,
                        required: need.required,
                    })
                    .collect(),
                settings_schema: serde_json::Value::Null,
            },
            description.settings_schema,
        )
    }};
}

impl Exports {
    /// Calls `describe`. Returns the unchecked description, and its settings schema as text.
    pub(crate) async fn describe<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
    ) -> wasmtime::Result<(types::Description, String)> {
        Ok(match self {
            Self::Validator(guest) => {
                described!(guest.batchwright_plugin_plugin().call_describe(store).await?)
            }
            Self::Adapter(guest, ..) => {
                described!(guest.batchwright_plugin_plugin().call_describe(store).await?)
            }
        })
    }

    /// Calls `configure` with the settings as a JSON object.
    pub(crate) async fn configure<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
        settings: &String,
    ) -> wasmtime::Result<Result<(), String>> {
        match self {
            Self::Validator(guest) => {
                guest.batchwright_plugin_plugin().call_configure(store, settings).await
            }
            Self::Adapter(guest, ..) => {
                guest.batchwright_plugin_plugin().call_configure(store, settings).await
            }
        }
    }

    /// Calls `validate` of a validator.
    pub(crate) async fn validate<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
        batch: types::BatchContext,
        lines: Vec<types::Line>,
    ) -> wasmtime::Result<Vec<types::Violation>> {
        let Self::Validator(guest) = self else { return Err(wrong_world("validate")) };
        let types::BatchContext { id, endpoint, metadata, first_model } = batch;
        let batch = validation::Batch { id, endpoint, metadata, first_model };
        let lines: Vec<_> = lines
            .into_iter()
            .map(|line| validation::Line { number: line.number, text: line.text })
            .collect();
        let violations =
            guest.batchwright_plugin_validation().call_validate(store, &batch, &lines).await?;
        Ok(violations.into_iter().map(types::Violation::from).collect())
    }

    /// Calls `begin` of an adapter.
    pub(crate) async fn begin<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
        request: types::Request,
    ) -> wasmtime::Result<types::Step> {
        let Self::Adapter(guest, ..) = self else { return Err(wrong_world("begin")) };
        let request = inference::Request {
            id: request.id,
            custom_id: request.custom_id,
            endpoint: request.endpoint,
            model: request.model,
            body: request.body,
            created_at: request.created_at,
            attempt: request.attempt,
        };
        Ok(guest.batchwright_plugin_inference().call_begin(store, &request).await?.into())
    }

    /// Calls `resume` of an adapter. `outcome` is unchanged after the call, and lost if the future
    /// is dropped before.
    pub(crate) async fn resume<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
        state: &[u8],
        outcome: &mut types::Outcome,
    ) -> wasmtime::Result<types::Step> {
        let Self::Adapter(guest, ..) = self else { return Err(wrong_world("resume")) };
        // Moved and moved back instead of copied: a response may be large, and the caller may
        // repeat the call.
        let moved = std::mem::replace(outcome, types::Outcome::Elapsed).into();
        let state = state.to_vec();
        let called = guest.batchwright_plugin_inference().call_resume(store, &state, &moved).await;
        *outcome = moved.into();
        Ok(called?.into())
    }

    /// Calls `classify` of an adapter that exports it.
    pub(crate) async fn classify<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
        status: u16,
        headers: Vec<(String, String)>,
        beginning: Vec<u8>,
    ) -> wasmtime::Result<types::Classification> {
        let Self::Adapter(_, Some(guest), _) = self else { return Err(wrong_world("classify")) };
        let head = classification::Head { status, headers, beginning };
        Ok(guest.batchwright_plugin_classification().call_classify(store, &head).await?.into())
    }

    /// Calls `stream-endpoints` of an adapter that exports it.
    pub(crate) async fn stream_endpoints<T: Send + 'static>(
        &self,
        store: &mut Store<T>,
    ) -> wasmtime::Result<Vec<String>> {
        let Self::Adapter(.., Some(guest)) = self else {
            return Err(wrong_world("stream-endpoints"));
        };
        guest.batchwright_plugin_streaming().call_stream_endpoints(store).await
    }
}

impl From<classification::Classification> for types::Classification {
    fn from(from: classification::Classification) -> Self {
        use classification::Standing;
        let standing = from.standing.map(|standing| match standing {
            Standing::Answered => types::ResponseClass::Answered,
            Standing::Busy => types::ResponseClass::Busy,
            Standing::Unauthorized => types::ResponseClass::Unauthorized,
            Standing::Forbidden => types::ResponseClass::Forbidden,
            Standing::Quota => types::ResponseClass::Quota,
            Standing::Failed => types::ResponseClass::Failed,
            Standing::Passing => types::ResponseClass::Passing,
        });
        let span = std::time::Duration::from_millis;
        Self {
            standing,
            delay: from.delay_milliseconds.map(span),
            left: from.remaining.zip(from.reset_milliseconds.map(span)),
        }
    }
}

fn wrong_world(function: &str) -> wasmtime::Error {
    wasmtime::Error::msg(format!("the component's world has no `{function}`"))
}

impl From<validation::Violation> for types::Violation {
    fn from(from: validation::Violation) -> Self {
        Self { line: from.line, code: from.code, message: from.message, param: from.param }
    }
}

impl From<inference::Step> for types::Step {
    fn from(from: inference::Step) -> Self {
        match from {
            inference::Step::Send(exchange) => Self::Send {
                request: HttpRequest {
                    method: exchange.request.method,
                    url: exchange.request.url,
                    headers: exchange
                        .request
                        .headers
                        .into_iter()
                        .map(|header| (header.name, header.value))
                        .collect(),
                    body: exchange.request.body,
                },
                state: exchange.state,
            },
            inference::Step::Wait(pause) => {
                Self::Wait { milliseconds: pause.milliseconds, state: pause.state }
            }
            inference::Step::Retry(advice) => Self::Retry {
                after_milliseconds: advice.after_milliseconds,
                otherwise: advice.otherwise.into(),
            },
            inference::Step::Done(answer) => Self::Done(answer.into()),
        }
    }
}

impl From<inference::Answer> for types::Answer {
    fn from(from: inference::Answer) -> Self {
        match from {
            inference::Answer::Response(response) => Self::Response(types::Response {
                status: response.status,
                request_id: response.request_id,
                body: response.body,
                usage: response.usage.map(|usage| types::Usage {
                    input_tokens: usage.input_tokens,
                    cached_input_tokens: usage.cached_input_tokens,
                    output_tokens: usage.output_tokens,
                    reasoning_tokens: usage.reasoning_tokens,
                }),
            }),
            inference::Answer::Failure(failure) => {
                Self::Failure(types::Failure { code: failure.code, message: failure.message })
            }
        }
    }
}

impl From<types::Outcome> for inference::Outcome {
    fn from(from: types::Outcome) -> Self {
        match from {
            types::Outcome::Response(response) => Self::Response(inference::HttpResponse {
                status: response.status,
                headers: response
                    .headers
                    .into_iter()
                    .map(|(name, value)| inference::Header { name, value })
                    .collect(),
                body: response.body,
            }),
            types::Outcome::Error(error) => Self::Error(inference::TransportError {
                fault: match error.fault {
                    TransportErrorKind::NameResolution => inference::TransportFault::NameResolution,
                    TransportErrorKind::Connection => inference::TransportFault::Connection,
                    TransportErrorKind::Tls => inference::TransportFault::Tls,
                    TransportErrorKind::Timeout => inference::TransportFault::Timeout,
                    TransportErrorKind::Protocol => inference::TransportFault::Protocol,
                    TransportErrorKind::TooLarge => inference::TransportFault::TooLarge,
                    TransportErrorKind::NotAllowed => inference::TransportFault::NotAllowed,
                },
                message: error.message,
            }),
            types::Outcome::Elapsed => Self::Elapsed,
        }
    }
}

impl From<inference::Outcome> for types::Outcome {
    fn from(from: inference::Outcome) -> Self {
        match from {
            inference::Outcome::Response(response) => Self::Response(HttpResponse {
                status: response.status,
                headers: response
                    .headers
                    .into_iter()
                    .map(|header| (header.name, header.value))
                    .collect(),
                body: response.body,
            }),
            inference::Outcome::Error(error) => Self::Error(TransportError::new(
                match error.fault {
                    inference::TransportFault::NameResolution => TransportErrorKind::NameResolution,
                    inference::TransportFault::Connection => TransportErrorKind::Connection,
                    inference::TransportFault::Tls => TransportErrorKind::Tls,
                    inference::TransportFault::Timeout => TransportErrorKind::Timeout,
                    inference::TransportFault::Protocol => TransportErrorKind::Protocol,
                    inference::TransportFault::TooLarge => TransportErrorKind::TooLarge,
                    inference::TransportFault::NotAllowed => TransportErrorKind::NotAllowed,
                },
                error.message,
            )),
            inference::Outcome::Elapsed => Self::Elapsed,
        }
    }
}
