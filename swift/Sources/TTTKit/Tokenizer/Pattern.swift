import Foundation
import TTTFormats

/// What a part of a tokenizer looks for: a text, or a regular expression.
struct Pattern: Sendable {
    private enum Kind: Sendable {
        case text([UInt8])
        case expression(NSRegularExpression)
    }

    private let kind: Kind

    /// - Parameter json: `{"String": …}` or `{"Regex": …}`.
    init(_ json: JSON?) throws {
        if let text = json?["String"]?.string, !text.isEmpty {
            self.init(text: Array(text.utf8))
        } else if let expression = json?["Regex"]?.string {
            try self.init(expression: expression)
        } else {
            throw TTTError.unsupported("tokenizer.json has a pattern that is neither text nor a regular expression")
        }
    }

    /// - Parameter text: UTF-8, not empty.
    init(text: [UInt8]) {
        kind = .text(text)
    }

    init(expression: String) throws {
        do {
            kind = .expression(try NSRegularExpression(pattern: Self.withUnicodeSpaces(expression)))
        } catch {
            throw TTTError.unsupported("tokenizer.json has a regular expression that is not understood: \(expression)")
        }
    }

    /// `\s` as the library `tokenizers` understands it: all of Unicode's white space.
    private static func withUnicodeSpaces(_ expression: String) -> String {
        var result = ""
        var isEscaped = false
        for scalar in expression.unicodeScalars {
            if isEscaped, scalar == "s" || scalar == "S" {
                result.removeLast()
                result += scalar == "s" ? "\\p{White_Space}" : "\\P{White_Space}"
            } else {
                result.unicodeScalars.append(scalar)
            }
            isEscaped = scalar == "\\" && !isEscaped
        }
        return result
    }

    /// Where it is found in UTF-8, from left to right; matches do not overlap.
    func matches(in text: [UInt8]) -> [Range<Int>] {
        switch kind {
        case .text(let wanted):
            var found: [Range<Int>] = []
            var at = 0
            while at + wanted.count <= text.count {
                if text[at] == wanted[0], text[at..<at + wanted.count].elementsEqual(wanted) {
                    found.append(at..<at + wanted.count)
                    at += wanted.count
                } else {
                    at += 1
                }
            }
            return found
        case .expression(let expression):
            let string = String(decoding: text, as: UTF8.self)
            let offsets = Self.offsets(ofUnits: string)
            let all = NSRange(location: 0, length: offsets.count - 1)
            return expression.matches(in: string, range: all).map { match in
                offsets[match.range.location]..<offsets[match.range.location + match.range.length]
            }
        }
    }

    /// The offset in UTF-8 of each code unit of UTF-16, and of the end.
    private static func offsets(ofUnits text: String) -> [Int] {
        var offsets: [Int] = []
        var offset = 0
        for scalar in text.unicodeScalars {
            for _ in 0..<UTF16.width(scalar) { offsets.append(offset) }
            offset += UTF8.width(scalar)
        }
        return offsets + [offset]
    }

    func replacing(in text: [UInt8], with content: [UInt8]) -> [UInt8] {
        var result: [UInt8] = []
        var end = 0
        for match in matches(in: text) {
            result += text[end..<match.lowerBound] + content
            end = match.upperBound
        }
        return result + text[end...]
    }
}
