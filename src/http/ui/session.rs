//! Sign-in with an API key, and the cookie that replaces the key afterwards.
//!
//! `session_token` is the value of the cookie; `visitor` reads it from a request.
//!
//! Pages are read-only, so only sign-in and sign-out need protection from other sites. Both require
//! a `POST` that the browser marks as same-origin. Attempts are not limited, because a key has 256
//! random bits.

use axum::Form;
use axum::extract::rejection::{FormRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use maud::html;
use serde::Deserialize;

use super::layout::{self, CurrentPage};
use super::visitor::COOKIE;
use crate::domain::api_key;
use crate::http::AppState;
use crate::http::auth;
use crate::http::error::ApiError;
use crate::http::ui::session_token::{LIFE_S, issue};

static FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
static FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

#[derive(Deserialize, Default)]
pub struct SignInParams {
    next: Option<String>,
}

/// Answers `GET /ui/sign-in`: the sign-in form.
pub async fn ask(query: Result<Query<SignInParams>, QueryRejection>) -> Response {
    let Query(wanted) = query.unwrap_or_default();
    form(&next(wanted.next), None).into_response()
}

#[derive(Deserialize)]
pub struct Credentials {
    key: String,
    next: Option<String>,
}

/// Signs a visitor in and redirects to the page that required it.
pub async fn sign_in(
    State(state): State<AppState>,
    headers: HeaderMap,
    credentials: Result<Form<Credentials>, FormRejection>,
) -> Result<Response, ApiError> {
    if !is_from_here(&headers) {
        return Ok(from_elsewhere());
    }

    let Form(Credentials { key, next: wanted }) =
        credentials.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge,
            _ => ApiError::BadBody,
        })?;

    let wanted = next(wanted);
    let hash = api_key::hash(key.trim().as_bytes());
    let found = state.store.key_by_hash(&hash).await?;
    let Some(key) = found.filter(|key| auth::scope(&state, vec![key.clone()]).is_ok()) else {
        let mistake = "This key is not valid: it may be mistyped, expired or revoked.";
        return Ok((StatusCode::UNAUTHORIZED, form(&wanted, Some(mistake))).into_response());
    };
    let session = issue(&state.secrets, &key.id, &hash, state.clock.now_s());

    Ok((
        set_cookie(&headers, &session, LIFE_S),
        Redirect::to(&wanted),
    )
        .into_response())
}

/// Deletes the session cookie.
pub async fn sign_out(headers: HeaderMap) -> Response {
    if !is_from_here(&headers) {
        return from_elsewhere();
    }
    (set_cookie(&headers, "", 0), Redirect::to("/ui/sign-in")).into_response()
}

/// Returns the header that sets the session cookie. The cookie is `Secure` if a proxy reports that
/// the browser used https.
fn set_cookie(headers: &HeaderMap, value: &str, life_s: i64) -> [(HeaderName, HeaderValue); 1] {
    let proto = headers
        .get(&FORWARDED_PROTO)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let is_secure = proto
        .split(',')
        .next()
        .is_some_and(|first| first.trim().eq_ignore_ascii_case("https"));
    let secure = if is_secure { "; Secure" } else { "" };
    let text =
        format!("{COOKIE}={value}; Path=/ui; Max-Age={life_s}; HttpOnly; SameSite=Strict{secure}");

    [(
        header::SET_COOKIE,
        HeaderValue::from_str(&text).expect("an id, a number and hex digits are a header value"),
    )]
}

/// Returns whether a `POST` comes from one of our pages. Over plain http some browsers send only
/// `Origin`, which must name this host.
fn is_from_here(headers: &HeaderMap) -> bool {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    match (
        text(&FETCH_SITE),
        text(&header::ORIGIN),
        text(&header::HOST),
    ) {
        (Some(site), _, _) => site == "same-origin",
        (None, Some(origin), Some(host)) => origin
            .split_once("://")
            .is_some_and(|(_, authority)| authority == host),
        _ => false,
    }
}

/// Answers 403 to a `POST` from another site.
fn from_elsewhere() -> Response {
    let text = "Your browser did not mark the request as coming from this site. \
                Open the page again and sign in or out there.";

    (
        StatusCode::FORBIDDEN,
        layout::notice("Request from another site", text),
    )
        .into_response()
}

/// Returns the page to open after the sign-in: the wanted page if it is one of ours, else `/ui`.
fn next(wanted: Option<String>) -> String {
    wanted
        .filter(|wanted| is_our_page(wanted))
        .unwrap_or_else(|| "/ui".to_owned())
}

/// Returns whether an address is one of our pages, other than those to sign in or out.
fn is_our_page(wanted: &str) -> bool {
    let rest = wanted.strip_prefix("/ui");
    let path = wanted.split('?').next().unwrap_or_default();

    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?']))
        && wanted
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'\\')
        // Our paths contain neither. Browsers resolve encoded dots, which could lead out of `/ui`.
        && !path.contains(['%', '.'])
        && !path.starts_with("/ui/sign-")
}

fn form(next: &str, mistake: Option<&str>) -> Html<String> {
    layout::page(
        "Sign in",
        CurrentPage::Outside,
        None,
        html! {
            section.sign-in {
                h1 { "Sign in" }
                @if let Some(mistake) = mistake { p.mistake role="alert" { (mistake) } }
                form method="post" action="/ui/sign-in" {
                    label for="key" { "API key" }
                    input #key type="password" name="key" autocomplete="current-password" spellcheck="false" required autofocus
                        aria-describedby="about-keys";
                    input type="hidden" name="next" value=(next);
                    button type="submit" { "Sign in" }
                }
                p.hint #about-keys {
                    "A tenant's key shows the invoices of its tenant, an operator's key shows everything. All pages are read-only. "
                    "You stay signed in for 12 hours."
                }
                // Browsers omit the session cookie for a link on another site, but send it after a
                // click here.
                @if mistake.is_none() && next != "/ui" { p.hint { "Signed in already? " a href=(next) { "Open the page" } "." } }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sign_in_redirects_only_to_our_pages() {
        for ours in ["/ui", "/ui?q=a", "/ui/invoice?tenant=acme&uid=a%20b.."] {
            assert_eq!(next(Some(ours.to_owned())), ours);
        }

        for other in [
            "",
            "//evil.example",
            "https://evil.example",
            "/uix",
            "/ui\r\nx",
            "/ui/\\evil",
            "/v1/events",
            "/ui/sign-in",
            "/ui/../evil",
            "/ui/%2e%2E/evil",
        ] {
            assert_eq!(next(Some(other.to_owned())), "/ui", "{other}");
        }
    }
}
