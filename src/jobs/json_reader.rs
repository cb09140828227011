//! Reads JSON documents from a file: one document, an array, a list response of Stripe, or one
//! document per line. The beginning of the file decides between these forms.
//!
//! Arrays and lines are read one document at a time, so a file may be larger than memory. The
//! reader does not change the text of a document.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;

use serde::Deserialize;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tokio::sync::mpsc;

/// The text of one document, or the reason why it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Line on which the document begins, from 1.
    pub line: usize,
    pub text: Result<String, String>,
}

/// A callback that receives each document. `Break` ends the reading.
type Each<'e> = &'e mut dyn FnMut(Document) -> ControlFlow<()>;

/// Documents buffered between the reading thread and the storing task. The number is small, so that
/// memory use stays constant.
const BUFFERED: usize = 256;

/// Reads a file (`-` for standard input) in a thread of its own. An I/O error is the last item.
pub fn stream(path: &Path) -> mpsc::Receiver<io::Result<Document>> {
    let (found, documents) = mpsc::channel(BUFFERED);
    let path = path.to_owned();

    tokio::task::spawn_blocking(move || {
        let mut each = |document| match found.blocking_send(Ok(document)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };

        let done = if path.as_os_str() == "-" {
            read_documents(io::stdin().lock(), &mut each)
        } else {
            File::open(&path).and_then(|file| read_documents(BufReader::new(file), &mut each))
        };
        if let Err(error) = done {
            // The send fails if the receiver was dropped.
            let _ = found.blocking_send(Err(error));
        }
    });

    documents
}

/// Reads all documents. Reading continues after an invalid line. It ends where an array or a single
/// document becomes invalid.
///
/// # Errors
/// Returns an error if the file cannot be read.
fn read_documents(mut reader: impl BufRead, each: Each) -> io::Result<()> {
    let (mut line, mut head) = (0, Vec::new());
    while head.trim_ascii().is_empty() {
        head.clear();
        line += 1;
        if reader.read_until(b'\n', &mut head)? == 0 {
            return Ok(());
        }
    }

    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head).to_vec();
    match head.trim_ascii_start()[0] {
        b'[' => read_array(line, io::Cursor::new(head).chain(reader), each),
        _ if is_json(&head) => read_lines(line, head, reader, each),
        _ => {
            // The file is one document over several lines, or its first line is invalid.
            let mut second = Vec::new();
            reader.read_until(b'\n', &mut second)?;
            if second.first() == Some(&b'{') && is_json(&second) {
                send(line, &head, each)
                    .map_or(Ok(()), |()| read_lines(line + 1, second, reader, each))
            } else {
                read_one(
                    line,
                    io::Cursor::new([head, second].concat()).chain(reader),
                    each,
                )
            }
        }
    }
}

fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(text).is_ok()
}

fn read_lines(
    mut line: usize,
    mut text: Vec<u8>,
    mut reader: impl BufRead,
    each: Each,
) -> io::Result<()> {
    loop {
        if !text.trim_ascii().is_empty() && send(line, &text, each).is_none() {
            return Ok(());
        }

        text.clear();
        line += 1;
        if reader.read_until(b'\n', &mut text)? == 0 {
            return Ok(());
        }
    }
}

fn read_one(line: usize, mut reader: impl Read, each: Each) -> io::Result<()> {
    let mut text = Vec::new();
    reader.read_to_end(&mut text)?;
    send(line, &text, each);
    Ok(())
}

/// Sends one text to the receiver. Each item of a list response is a document. Returns `None` if
/// the receiver has ended the reading.
fn send(line: usize, text: &[u8], each: Each) -> Option<()> {
    #[derive(Deserialize)]
    struct List<'t> {
        object: String,
        #[serde(borrow)]
        data: Vec<&'t RawValue>,
    }

    if let Ok(list) = serde_json::from_slice::<List>(text)
        && list.object == "list"
    {
        return list.data.iter().try_for_each(|item| {
            continues(each(Document {
                line,
                text: Ok(item.get().to_owned()),
            }))
        });
    }

    let text = match serde_json::from_slice::<&RawValue>(text) {
        Ok(raw) => Ok(raw.get().to_owned()),
        Err(error) => Err(not_json(&error, line)),
    };
    continues(each(Document { line, text }))
}

fn continues(flow: ControlFlow<()>) -> Option<()> {
    flow.is_continue().then_some(())
}

fn not_json(error: &serde_json::Error, first_line: usize) -> String {
    let fault = if error.is_eof() {
        "ends in the middle of a document"
    } else {
        "is not JSON"
    };
    format!(
        "{fault} (line {}, column {})",
        first_line + error.line().max(1) - 1,
        error.column()
    )
}

fn read_array(line: usize, reader: impl BufRead, each: Each) -> io::Result<()> {
    let lines = Rc::new(Cell::new(line));
    let counting = CountingLines {
        inner: reader,
        lines: lines.clone(),
    };

    let mut json = serde_json::Deserializer::from_reader(counting);
    let read = json
        .deserialize_seq(Items {
            lines: &lines,
            each: &mut *each,
        })
        .and_then(|done| if done { json.end() } else { Ok(()) });

    match read {
        Err(error) if error.is_io() => Err(error.into()),
        Err(error) => {
            let _ = each(Document {
                line: lines.get(),
                text: Err(not_json(&error, line)),
            });
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Visitor of an array that sends each item to the receiver.
struct Items<'r, 'e> {
    lines: &'r Cell<usize>,
    each: Each<'e>,
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    /// `false` if the receiver has ended the reading.
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of documents")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<bool, A::Error> {
        while let Some(item) = items.next_element::<Box<RawValue>>()? {
            let text = item.get().to_owned();
            let line = self.lines.get() - text.matches('\n').count();
            if (self.each)(Document {
                line,
                text: Ok(text),
            })
            .is_break()
            {
                // serde requires a visitor to read the sequence to its end.
                while items.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                return Ok(false);
            }
        }

        Ok(true)
    }
}

/// A reader that counts lines. It returns one byte at a time, so the count is exact.
struct CountingLines<R> {
    inner: R,
    lines: Rc<Cell<usize>>,
}

impl<R: BufRead> Read for CountingLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(1);
        let read = self.inner.read(&mut buffer[..wanted])?;
        if read == 1 && buffer[0] == b'\n' {
            self.lines.set(self.lines.get() + 1);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(text: &str) -> Vec<(usize, Result<String, String>)> {
        let mut found = Vec::new();
        let mut each = |document: Document| {
            found.push((document.line, document.text));
            ControlFlow::Continue(())
        };
        read_documents(text.as_bytes(), &mut each).unwrap();
        found
    }

    fn ok(line: usize, text: &str) -> (usize, Result<String, String>) {
        (line, Ok(text.to_owned()))
    }

    #[test]
    fn documents_arrays_lists_and_lines_are_distinguished() {
        assert_eq!(
            documents("\n{\n \"a\": 1.50\n}\n"),
            [ok(2, "{\n \"a\": 1.50\n}")]
        );
        assert_eq!(
            documents("[\n {\"a\":1},\n {\"a\":\n2}]"),
            [ok(2, "{\"a\":1}"), ok(3, "{\"a\":\n2}")]
        );
        assert_eq!(documents("[{\"a\":1}]"), [ok(1, "{\"a\":1}")]);
        assert_eq!(
            documents("{\"object\":\"list\",\"data\":[{\"a\":1},{\"a\":2}]}"),
            [ok(1, "{\"a\":1}"), ok(1, "{\"a\":2}")]
        );
        assert_eq!(
            documents("{\"a\":1}\n\n {\"a\":2} \r\n{\"a\":3}"),
            [ok(1, "{\"a\":1}"), ok(3, "{\"a\":2}"), ok(4, "{\"a\":3}")]
        );
        assert_eq!(documents(" \n"), []);

        assert_eq!(documents(""), []);
    }

    #[test]
    fn reading_continues_after_invalid_line() {
        let found = documents("{\"a\":1}\n{\"a\":\nxyz\n{\"a\":2}");
        assert_eq!(found[0], ok(1, "{\"a\":1}"));
        assert_eq!(
            found[1],
            (
                2,
                Err("ends in the middle of a document (line 3, column 0)".to_owned())
            )
        );
        assert_eq!(
            found[2],
            (3, Err("is not JSON (line 3, column 1)".to_owned()))
        );
        assert_eq!(found[3], ok(4, "{\"a\":2}"));

        assert_eq!(documents("{\"a\":\n{\"a\":2}\n")[1], ok(2, "{\"a\":2}"));
    }

    #[test]
    fn truncated_array_yields_its_complete_items() {
        let found = documents("[{\"a\":1},\n{\"a\":");
        assert_eq!(found[0], ok(1, "{\"a\":1}"));
        assert!(found[1].1.is_err());
    }
}
