//! The text format of LVM's metadata: sections, and settings that are text, numbers or lists of them.

use std::collections::BTreeMap;

/// Nested sections; LVM's own go four deep.
const DEPTH_LIMIT: u32 = 16;
/// Sections, settings and list members together.
const NODE_LIMIT: usize = 250_000;

/// The value of a setting.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    /// A fraction, which no caller needs.
    Other,
    List(Vec<Value>),
}

/// Settings and sections by name. Of two with one name the last counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Section {
    pub(super) values: BTreeMap<String, Value>,
    pub(super) sections: BTreeMap<String, Section>,
}

impl Section {
    /// Parses text; an error names the line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text, at: 0, node_count: 0 };
        let result = parser.section(0);
        result.map_err(|fact| {
            let line = 1 + text[..parser.at].matches('\n').count();
            format!("line {line}: {fact}")
        })
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::Text(text) => Some(text),
            Value::Number(_) | Value::Other | Value::List(_) => None,
        }
    }

    /// A number of 32 bits: only device sizes are larger, and no caller needs them.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            Value::Number(number) => {
                u64::try_from(*number).ok().filter(|number| u32::try_from(*number).is_ok())
            }
            Value::Text(_) | Value::Other | Value::List(_) => None,
        }
    }

    pub(super) fn list(&self, key: &str) -> &[Value] {
        match self.values.get(key) {
            Some(Value::List(list)) => list,
            // LVM treats a single value as a list of one.
            Some(value) => std::slice::from_ref(value),
            None => &[],
        }
    }

    /// Whether a list contains this word.
    pub(super) fn has(&self, key: &str, word: &str) -> bool {
        self.list(key).iter().any(|value| matches!(value, Value::Text(text) if text == word))
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    node_count: usize,
}

type Parsed<T> = Result<T, &'static str>;

impl Parser<'_> {
    fn section(&mut self, depth: u32) -> Parsed<Section> {
        let mut section = Section::default();
        loop {
            match (self.peek(), depth) {
                (None, 0) => return Ok(section),
                (None, _) => return Err("a section does not end"),
                (Some(b'}'), 1..) => {
                    self.at += 1;
                    return Ok(section);
                }
                (Some(_), _) => {}
            }
            let name = self.name()?;
            self.count()?;
            match self.peek() {
                Some(b'{') if depth < DEPTH_LIMIT => {
                    self.at += 1;
                    let inner = self.section(depth + 1)?;
                    section.sections.insert(name, inner);
                }
                Some(b'{') => return Err("sections are nested too deeply"),
                Some(b'=') => {
                    self.at += 1;
                    let value = self.value()?;
                    section.values.insert(name, value);
                }
                _ => return Err("neither a section nor a setting"),
            }
        }
    }

    fn name(&mut self) -> Parsed<String> {
        let rest = &self.text[self.at..];
        let ends = |c: char| c.is_whitespace() || matches!(c, '#' | '=' | '{' | '}' | '[' | ']' | ',' | '"');
        let len = rest.find(ends).unwrap_or(rest.len());
        if len == 0 {
            return Err("a name is missing");
        }
        self.at += len;
        Ok(rest[..len].to_owned())
    }

    fn value(&mut self) -> Parsed<Value> {
        if self.peek() != Some(b'[') {
            return self.scalar();
        }
        self.at += 1;
        let mut list = Vec::new();
        loop {
            match self.peek() {
                Some(b']') => {
                    self.at += 1;
                    return Ok(Value::List(list));
                }
                Some(b',') => self.at += 1,
                _ => {
                    self.count()?;
                    list.push(self.scalar()?);
                }
            }
        }
    }

    fn scalar(&mut self) -> Parsed<Value> {
        if self.peek() == Some(b'"') {
            self.at += 1;
            return self.quoted();
        }
        let word = self.name()?;
        if let Ok(number) = word.parse() {
            return Ok(Value::Number(number));
        }
        if word.parse::<f64>().is_ok() { Ok(Value::Other) } else { Err("neither text nor a number") }
    }

    /// The text after a quotation mark, up to the next one.
    fn quoted(&mut self) -> Parsed<Value> {
        let mut text = String::new();
        let mut chars = self.text[self.at..].char_indices();
        while let Some((index, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += index + 1;
                    return Ok(Value::Text(text));
                }
                '\\' => text.extend(chars.next().map(|(_, c)| c)),
                c => text.push(c),
            }
        }
        Err("text does not end")
    }

    /// The next byte that is neither space nor comment.
    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        loop {
            let byte = *bytes.get(self.at)?;
            if byte == b'#' {
                self.at += bytes[self.at..].iter().position(|byte| *byte == b'\n')?;
            } else if byte.is_ascii_whitespace() {
                self.at += 1;
            } else {
                return Some(byte);
            }
        }
    }

    fn count(&mut self) -> Parsed<()> {
        self.node_count += 1;
        if self.node_count > NODE_LIMIT { Err("there are too many settings") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_every_kind_are_read() {
        let text = r#"
            # a comment { with = "things" }
            vg-1.a+b {
                id = "a\"b\\c"   # more
                seqno = 12 share = 0.5
                empty { }
                status = ["READ", "WRITE"] none=[]
                stripes = [
                    "pv0", 0,
                    "pv1", 7
                ]
            }
            version = 1
            # the end"#;
        let all = Section::parse(text).unwrap();
        let group = &all.sections["vg-1.a+b"];
        assert_eq!(group.text("id"), Some("a\"b\\c"));
        assert_eq!(
            (group.number("seqno"), all.number("version"), group.number("share")),
            (Some(12), Some(1), None)
        );
        assert!(
            group.has("status", "WRITE") && !group.has("status", "EXPORTED") && group.list("none").is_empty()
        );
        let stripes = ["pv0", "pv1"].map(|name| Value::Text(name.to_owned()));
        let [first, second] = stripes;
        assert_eq!(group.list("stripes"), [first, Value::Number(0), second, Value::Number(7)]);
        assert_eq!(group.sections["empty"], Section::default());
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let deep = "a {\n".repeat(1000);
        let many = format!("a = [{}]", "1,".repeat(NODE_LIMIT + 1));
        let broken =
            ["a {", "a = ", "a = \"b", "a = [1", "a", "}", "= 1", "a = b", "a = [[1]]", &deep, &many];
        for text in broken {
            assert!(Section::parse(text).is_err(), "{}", &text[..text.len().min(40)]);
        }
        assert_eq!(Section::parse("a = 1\nb = {").unwrap_err(), "line 2: a name is missing");
    }
}
