/// How byte-level tokenizers write bytes as characters: printable Latin-1 as itself, the others from U+0100 on.
enum ByteAlphabet {
    private static let scalars: [UInt32] = {
        let printable = Set(Array(0x21...0x7E) + Array(0xA1...0xAC) + Array(0xAE...0xFF))
        var next: UInt32 = 0x100
        return (0..<0x100).map { byte in
            if printable.contains(byte) { return UInt32(byte) }
            defer { next += 1 }
            return next
        }
    }()

    private static let characterOfByte: [[UInt8]] = scalars.map { value in
        Array(String(Unicode.Scalar(value).map(Character.init) ?? "?").utf8)
    }

    private static let byteOfScalar: [UInt32: UInt8] = Dictionary(
        uniqueKeysWithValues: scalars.enumerated().map { ($1, UInt8($0)) })

    /// The characters of these bytes, as UTF-8.
    static func characters(_ bytes: [UInt8]) -> [UInt8] {
        bytes.flatMap { characterOfByte[Int($0)] }
    }

    /// The bytes of a token; nil if it has other characters.
    static func bytes(_ token: String) -> [UInt8]? {
        var bytes: [UInt8] = []
        for scalar in token.unicodeScalars {
            guard let byte = byteOfScalar[scalar.value] else { return nil }
            bytes.append(byte)
        }
        return bytes
    }
}
